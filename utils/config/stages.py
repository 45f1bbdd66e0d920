"""Which stages read which settings: what may change while finished stages are kept."""

from collections.abc import Mapping

ALL, TRAINING, STUDENTS, LABELING = (1, 2, 3, 4, 5, 6), (1, 4, 6), (4, 6), (2, 5)

# By the beginning of a key; of several that fit the longest one counts. (): changes no result.
READERS: Mapping[str, tuple[int, ...]] = {
    "method": (2, 3, 4, 5, 6),  # stage 1 reads what the method sets, not its name
    "name": (),
    "outdir": (),
    "seed": ALL,
    "device": ALL,
    "precision": ALL,
    "deterministic": ALL,
    "workers": (),
    "cache": (),
    "stages": (2, 3, 4, 5, 6),  # stage 1 is the same in all of them
    "tensorboard": (),
    "wandb": (),
    "checkpoint_every": (),
    "dataset": ALL,
    "dataset.unlabeled": (2, 3, 4, 5, 6),
    "dataset.val": TRAINING,
    "dataset.groups": (1, 2, 4, 5, 6),  # and 1_fold_*
    "dataset.test": (),  # scored when the run ends
    "augment": TRAINING,
    "augment.strong": STUDENTS,
    "model": ALL,
    "optimizer": TRAINING,
    "loss": TRAINING,
    "loss.class_weights": (*TRAINING, *LABELING),  # labels are made for the weights
    "ohem": TRAINING,
    "supervised": (1,),
    "supervised.start": (),  # says what the next round does; the report of stage 1 has what it did
    "pseudo_label": LABELING,
    "query": (1, 3, 4, 6),
    "select": (3,),
    "select.score": (1, 3),  # 'stability' keeps earlier networks of stage 1
    "retrain": STUDENTS,
    "retrain.labels": (2, *STUDENTS),  # stage 2 stores votes for 'average'
    "inference": ALL,
    "evaluate": TRAINING,
    "panels": (),
}

# What saves memory. It may change at any time, for the stages that are still to be done.
HOW = (
    "supervised.accumulate",
    "retrain.accumulate",
    "inference.batch_size",
    "inference.window",
)


def readers(key: str) -> tuple[int, ...]:
    """Return the numbers of the stages whose results a setting can change.

    Raises:
        KeyError: ``READERS`` does not know the key.
    """
    parts = key.split(".")
    for count in range(len(parts), 0, -1):
        found = READERS.get(".".join(parts[:count]))
        if found is not None:
            return found
    raise KeyError(f"{key}: add to READERS in utils/config/stages.py which stages read it")


def saves_memory(key: str) -> bool:
    """Tell whether a setting is of those in ``HOW``."""
    return any(key == how or key.startswith(f"{how}.") for how in HOW)
