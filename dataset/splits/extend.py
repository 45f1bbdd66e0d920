"""Add new labels to the labeled list of a run, and take their images off the unlabeled one."""

from pathlib import Path

from dataset.catalog import dataset_info
from dataset.lists import find_root, line_of, read_list, read_lists, write_lists
from utils.errors import UserError
from utils.run.folder import read_kept


def extend_lists(run: Path, labels: Path, folder: Path) -> list[str]:
    """Write ``labeled.txt``, the run's list and the new lines, and ``unlabeled.txt``, the rest.

    Args:
        run: its folder; the lists are those of its config.
        labels: list of the new images with their masks.
        folder: gets both lists.

    Returns:
        What was done and how the run goes on, in lines.

    Raises:
        UserError: no run, no data; an image without a mask, or one that is in the labeled list or
            in another one that is no source of labels; other lists are there.
    """
    config = read_kept(run)
    root, kind = find_root(config.dataset), dataset_info(config.dataset)
    splits, new = read_lists(config.dataset), read_list(labels, root, kind)
    others = {
        x.name: f"dataset.{where}" for where in ("val", "test") for x in getattr(splits, where)
    }
    others |= {sample.name: "dataset.labeled" for sample in splits.labeled}
    for sample in new:
        if sample.mask is None:
            raise UserError(f"{labels}: {sample.name} has no mask; name it beside it")
        if sample.name in others:
            raise UserError(
                f"{labels}: {sample.name} is in {others[sample.name]} already; take it off here"
            )
    names = {sample.name for sample in new}
    left = [sample for sample in splits.unlabeled if sample.name not in names]
    if not left:
        raise UserError(
            f"{labels}: labels every image of dataset.unlabeled; add others there, or train on "
            "labels alone by --method supervised"
        )
    lists = {"labeled": [*splits.labeled, *new], "unlabeled": left}
    write_lists(folder, {key: [line_of(x, root) for x in lists[key]] for key in lists})
    taken = len(splits.unlabeled) - len(left)
    keys = [f"dataset.{key}={(folder / key).absolute()}.txt" for key in lists]
    keys += ["dataset.split=null"] if config.dataset.split is not None else []
    return [
        f"{folder / 'labeled.txt'}: {len(splits.labeled)} images and {len(new)} new ones",
        f"{folder / 'unlabeled.txt'}: {len(left)} images, without {taken} that have labels now",
        "the run goes on, and keeps its result in rounds/, by its command with",
        f"  {' '.join(keys)} supervised.start=last",
    ]
