"""What a run folder holds, for those that read it or write beside it."""

from pathlib import Path

STAGES = ("1_supervised", "2_pseudo_label", "3_select", "4_retrain", "5_relabel", "6_retrain")
# What a run makes beside its stages; other names in its folder are the user's.
_FILES = (
    *("config.yaml", "lists.json", "environment.json", "log.txt", "metrics.jsonl", "results.json"),
    *("diagnosis.json", "examples.png", "lock", "lock.holder"),
)
_FOLDERS = ("val", "tensorboard", "wandb")


def is_run_folder(folder: Path) -> bool:
    """Tell whether a run works or has worked in a folder."""
    others = (folder / name for name in ("lists.json", *STAGES))
    return (folder / "config.yaml").is_file() and any(path.exists() for path in others)


def run_of(path: Path) -> Path | None:
    """Return the run folder whose own file or folder a path is; None if it is of no run.

    Args:
        path: absolute, without links; it need not exist.
    """
    names = {*_FILES, *_FOLDERS, *STAGES}
    for below, folder in zip([path, *path.parents], path.parents, strict=False):
        if below.name in names and is_run_folder(folder):
            return folder
    return None
