"""What all data sets need: files written on all cores, then the lists that name them."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from tqdm import tqdm

from utils.errors import UserError
from utils.files import write_atomically, write_text


class Step(NamedTuple):
    """Files to write, each from one source."""

    title: str  # of the progress bar
    write: Callable[[Any, Path], None]  # (source, path), writes atomically
    sources: Mapping[Path, Any]  # by path


def complete(
    root: Path,
    lists: Mapping[str, Sequence[str]],
    counts: Mapping[str, int],
    steps: Sequence[Step],
    workers: int,
) -> None:
    """Write the missing files of a data set, then its lists.

    Files that exist are complete and are left alone, so a killed run continues where it stopped.

    Args:
        root: folder of the data set.
        lists: the lines of ``<name>.txt``, by name.
        counts: how many lines each must have.
        steps: the files to write; their sources are paths or records.
        workers: threads.

    Raises:
        UserError: before anything is written: a source is missing, another number of images, or a
            list with other lines is there; later what a step raises.
    """
    for step in steps:
        refuse_missing(source for source in step.sources.values() if isinstance(source, Path))
    for name, lines in lists.items():
        _refuse_other_list(root / f"{name}.txt", lines, counts[name])
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
    """Read the names in a published list; a ``UserError`` if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this list ({error}); unpack it again") from error


def import_extra(name: str, package: str, use: str) -> ModuleType:
    """Import what one data set alone needs; a ``UserError`` if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise UserError(f"{package}: not installed; {use}: pip install {package}") from error


def copy_file(source: Path, path: Path) -> None:
    """Copy a file, atomically."""
    write_atomically(path, lambda beside: shutil.copyfile(source, beside))


def _refuse_other_list(path: Path, lines: Sequence[str], count: int) -> None:
    if len(lines) != count:
        raise UserError(
            f"{path.parent}: {len(lines)} images for {path.name} where the data set has {count}; "
            "nothing is written: complete the files and run it again"
        )
    if path.exists() and sorted(read_words(path)) != sorted(" ".join(lines).split()):
        raise UserError(f"{path}: another list is there; rename it, ours has this name")


def _write_missing(step: Step, workers: int) -> None:
    jobs = [(source, path) for path, source in step.sources.items() if not path.exists()]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        written = pool.map(step.write, *zip(*jobs, strict=True))
        for _ in tqdm(written, step.title, len(jobs), disable=None, leave=False):
            pass
