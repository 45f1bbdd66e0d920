"""What the data sets share: masks written over all cores, and lists that say they are complete."""

import shutil
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tqdm import tqdm

from utils.errors import UserError
from utils.files import write_atomically, write_text

_CHUNK = 16  # files a worker takes at once


class Step(NamedTuple):
    """Files to write, one from one source.

    Attributes:
        title: of the progress bar.
        write: takes a source and the path to write, atomically; a function of a module.
        sources: by path.
    """

    title: str
    write: Callable[[Any, Path], None]
    sources: Mapping[Path, Any]


def complete(
    root: Path,
    lists: Mapping[str, Sequence[str]],
    counts: Mapping[str, int],
    steps: Iterable[Step],
    workers: int,
) -> None:
    """Write what is missing of a data set, and last its lists.

    Files that exist are whole and stay as they are, so a killed run goes on where it stopped.

    Args:
        root: folder of the data set.
        lists: the lines of ``<name>.txt``, by name.
        counts: how many lines each must have.
        steps: the files to write.
        workers: processes; below 2, all is done in this one.

    Raises:
        UserError: another number of images, or a list with other lines in the place of ours, found
            before anything is written; or what a step raises.
    """
    _refuse_other_counts(root, lists, counts)
    _refuse_other_lists(root, lists)
    for step in steps:
        _write_missing(step, workers)
    for name, lines in lists.items():
        if not (root / f"{name}.txt").exists():
            write_text(root / f"{name}.txt", "".join(f"{line}\n" for line in lines))
    ready = ", ".join(f"{name}.txt ({len(lines)} images)" for name, lines in lists.items())
    print(f"{root}: ready, with {ready}")


def refuse_missing(files: Iterable[Path]) -> None:
    """Raise a ``UserError`` that names the first of these files that does not exist."""
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]}: no such file ({len(missing)} are missing in all); "
            "delete the folder and unpack its archive again"
        )


def read_words(path: Path) -> list[str]:
    """Read the names in a published list.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this list ({error}); unpack it again") from error


def import_extra(name: str, package: str, use: str) -> ModuleType:
    """Import what only one data set needs.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"{package}: not installed; {use}: pip install {package}") from error


def copy_file(source: Path, path: Path) -> None:
    """Copy a file, atomically."""
    write_atomically(path, lambda beside: shutil.copyfile(source, beside))


def _write_missing(step: Step, workers: int) -> None:
    jobs = [(source, path) for path, source in step.sources.items() if not path.exists()]
    total = len(step.sources)
    bar = partial(
        tqdm, desc=step.title, total=total, initial=total - len(jobs), disable=None, leave=False
    )
    if min(workers, len(jobs)) < 2:
        for source, path in bar(jobs):
            step.write(source, path)
        return
    pool = ProcessPoolExecutor(min(workers, len(jobs)), initializer=_leave_interrupts_to_the_parent)
    try:
        for _ in bar(pool.map(step.write, *zip(*jobs, strict=True), chunksize=_CHUNK)):
            pass
    except BrokenProcessPool as error:
        raise UserError(
            f"--workers: one of {workers} was killed, for want of memory perhaps; "
            "the same command goes on, with fewer workers if need be"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _refuse_other_counts(
    root: Path, lists: Mapping[str, Sequence[str]], counts: Mapping[str, int]
) -> None:
    for name, lines in lists.items():
        if len(lines) != counts[name]:
            raise UserError(
                f"{root}: {len(lines)} images for {name}.txt where the data set has "
                f"{counts[name]}; nothing is written: complete the files and run it again"
            )


def _refuse_other_lists(root: Path, lists: Mapping[str, Sequence[str]]) -> None:
    """A list of the user's own is not to be overwritten."""
    for name, lines in lists.items():
        path = root / f"{name}.txt"
        if path.exists() and sorted(read_words(path)) != sorted(" ".join(lines).split()):
            raise UserError(f"{path}: another list is there; rename it, ours goes by this name")
