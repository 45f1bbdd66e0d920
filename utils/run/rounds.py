"""Rounds of a run: with other lists of images it trains again, and ``rounds/1`` keeps the result.

The folder of an ended round is a run folder: reports and evaluation take it as any other.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from utils.files import read_json, writing
from utils.run.folder import ROUND, STAGES, rounds_of

# What the next round needs of stages that it keeps, beside their folders.
_READ = ("config.yaml", "lists.json", "environment.json", "metrics.jsonl")
_PARTIAL, _BEGUN = ".partial", ".begun"  # names in ``rounds`` of what is not there yet


def end_round(folder: Path, kept: Sequence[str]) -> Path:
    """Move what a run has made to ``rounds/<number>``, whose path is returned.

    Args:
        folder: of the run, which has finished.
        kept: names of the stages that stay in the run too; their files are linked, not copied,
            where the file system can.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    rounds = folder / "rounds"
    partial = rounds / _PARTIAL
    with writing(rounds):
        shutil.rmtree(partial, ignore_errors=True)  # of a kill
        partial.mkdir(parents=True)
        for name in kept:
            shutil.copytree(folder / name, partial / name, copy_function=_link)
        for name in _READ if kept else ():
            if (folder / name).is_file():
                shutil.copy2(folder / name, partial / name)  # logs are appended to in place
        partial.rename(rounds / _BEGUN)
    return finish_round(folder)


def is_ending(folder: Path) -> bool:
    """Tell whether a kill left a round half ended; ``finish_round`` ends it."""
    return (folder / "rounds" / _BEGUN).is_dir()


def finish_round(folder: Path) -> Path | None:
    """Move what is left to move of a round that is being ended; return its path, or None.

    What the round has already is kept by the run, or was moved before a kill.
    """
    begun = folder / "rounds" / _BEGUN
    if not is_ending(folder):
        return None
    with writing(begun):
        for name in ROUND:
            if (folder / name).exists() and not (begun / name).exists():
                (folder / name).rename(begun / name)
        ended = begun.with_name(str(1 + max((int(x.name) for x in rounds_of(folder)), default=0)))
        begun.rename(ended)
    return ended


def former_network(folder: Path) -> Path | None:
    """Return the checkpoint with which the newest ended round of a run closed; None: no round."""
    whole = [name for name in STAGES if "fold" not in name]  # folds miss labeled images
    files = [x / name / "checkpoint.pth" for x in rounds_of(folder)[-1:] for name in whole]
    return next((file for file in reversed(files) if file.is_file()), None)


def tell_round(folder: Path, ended: Path) -> str:
    """Say where the result of a round is, and what the next one does again."""
    kept = [name for name in STAGES if (folder / name).is_dir()]
    again = "all stages start again" if not kept else f"{', '.join(kept)} kept, later stages again"
    miou = 100 * read_json(ended / "results.json")["miou"]
    return f"{folder}: the result so far, mIoU {miou:.2f} %, is in {ended}; {again}"


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
