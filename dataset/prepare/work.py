"""Preparing a data set: archives, then files written on all cores, then lists that name them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from dataset.lists import write_lists
from dataset.prepare.archives import Archive, provide
from utils.errors import UserError
from utils.files import read_text


class Step(NamedTuple):
    """Files to write, each from one source."""

    title: str  # of the progress bar
    write: Callable[[Any, Path], None]  # (source, path), writes atomically
    sources: Mapping[Path, Any]  # path or record, by the path of the file to write


class DataSet(NamedTuple):
    """A public data set, and how it gets the layout that configs read."""

    about: str  # for --help
    archives: Sequence[Archive]
    counts: Mapping[str, int]  # images of each list
    # The lines of each list, and the files to write, of the unpacked archives below a root.
    plan: Callable[[Path], tuple[Mapping[str, Sequence[str]], Sequence[Step]]]
    requires: str = ""  # a package that no other command needs


def prepare(data: DataSet, root: Path, fetch: bool, workers: int) -> None:
    """Unpack the archives, write the missing files of a data set by threads, then its lists.

    Files that exist are complete and are left alone, so a killed run continues where it stopped.

    Raises:
        UserError: a package, an archive, a source or an image is missing, before anything is
            written; later what a step raises, or a list with other lines is there.
    """
    if data.requires:
        require(data.requires)
    provide(root, data.archives, fetch)
    lists, steps = data.plan(root)
    for step in steps:
        refuse_missing(source for source in step.sources.values() if isinstance(source, Path))
    for name, count in data.counts.items():
        if len(lists[name]) != count:
            raise UserError(
                f"{root}: {len(lists[name])} images for {name}.txt where the data set has {count}; "
                "nothing is written: complete the files and run it again"
            )
    for step in steps:
        jobs = [(source, path) for path, source in step.sources.items() if not path.exists()]
        with ThreadPoolExecutor(max(1, workers)) as pool:
            written = pool.map(step.write, *zip(*jobs, strict=True))
            list(tqdm(written, step.title, len(jobs), disable=None, leave=False))
    write_lists(root, lists)
    counts = ", ".join(f"{name}.txt ({count} images)" for name, count in data.counts.items())
    print(f"{root}: ready, with {counts}")


def require(package: str, name: str | None = None) -> None:
    """Raise a ``UserError`` if a package is missing.

    Args:
        package: as it is imported.
        name: as it is installed; None: the same.
    """
    if find_spec(package) is None:
        raise UserError(f"{name or package}: not installed; run: pip install {name or package}")


def refuse_missing(files: Iterable[Path]) -> None:
    """Raise a ``UserError`` that names the first of these files that does not exist."""
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]}: no such file ({len(missing)} are missing in all); "
            "delete the folder and unpack its archive again"
        )


def read_words(path: Path) -> list[str]:
    """Read the names in a published list; a ``UserError`` if it is missing."""
    refuse_missing([path])
    return read_text(path).split()
