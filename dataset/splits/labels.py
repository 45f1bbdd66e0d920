"""What the files of samples hold: labels, and every fault instead of the first."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset.catalog import Kind
from dataset.ids import UNKNOWN, id_table
from dataset.reading import decoded_size, picture_size, read_ids
from dataset.splits.samples import Sample
from utils import IGNORE
from utils.errors import UserError

T = TypeVar("T")


class Fault(NamedTuple):
    """Something that training refuses.

    Attributes:
        what: the same words for all faults of a sort.
        line: what is wrong in this place, and what to do.
    """

    what: str
    line: str


class Label(NamedTuple):
    """The label of a sample whose files have been read.

    Attributes:
        mask: class ids, mode L; None where there are faults.
        faults: of the image and of the mask.
    """

    mask: Image.Image | None
    faults: list[Fault]


def read_labels(
    samples: Iterable[Sample],
    kind: Kind,
    size_of: Callable[[Path], tuple[int, int]] = picture_size,
) -> Iterator[Label]:
    """Read every image's size and every mask, under a progress bar.

    Args:
        samples: to read.
        kind: tells what ids mean.
        size_of: reads (height, width) of an image; ``decoded_size`` finds truncated ones.
    """
    table = id_table(kind.classes) if kind.ids is None else np.frombuffer(kind.ids, np.int16)
    for sample in tqdm(samples, desc="reading masks", disable=None, leave=False, unit="image"):
        ids, faults = None, []
        size = _attempt(size_of, sample.image, faults)
        if sample.mask is None:
            line = f"{sample.name} stands there without a mask; name it beside it"
            faults.append(Fault("lines without a mask", line))
        else:
            ids = _attempt(read_ids, sample.mask, faults)
        if ids is not None:
            faults += _faults_of(ids, size, sample, table)
        mask = None if faults else Image.fromarray(table[ids].astype(np.uint8))
        yield Label(mask, faults)


def image_faults(samples: Sequence[Sample]) -> list[Fault]:
    """Decode every image, on all cores, and no mask."""
    faults: list[Fault] = []
    bar = tqdm(total=len(samples), desc="reading images", disable=None, leave=False, unit="image")
    with bar, ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda sample: _attempt(decoded_size, sample.image, faults), samples):
            bar.update()
    return sorted(faults)


def class_areas(mask: Image.Image, num_classes: int) -> np.ndarray:
    """Count the pixels of every class.

    Args:
        mask: class ids below ``num_classes``, or 255.
        num_classes: C.

    Returns:
        (C,) int64, without those that are 255.
    """
    ids = np.asarray(mask)
    return np.bincount(ids[ids != IGNORE], minlength=num_classes)


def _attempt(read: Callable[[Path], T], path: Path, faults: list[Fault]) -> T | None:
    """Read a file, or add why it cannot be read to the faults."""
    try:
        return read(path)
    except UserError as error:
        faults.append(Fault(f"files {'unreadable' if path.is_file() else 'missing'}", str(error)))
        return None


def _faults_of(
    ids: np.ndarray, size: tuple[int, int] | None, sample: Sample, table: np.ndarray
) -> Iterator[Fault]:
    if size is not None and size != ids.shape:
        yield Fault(
            "sizes that differ",
            f"{sample.mask}: this mask is {ids.shape[0]} x {ids.shape[1]} and its image "
            f"{sample.image} is {size[0]} x {size[1]} (height x width); they must agree",
        )
    shown = np.unique(ids)
    unknown = shown[table[shown] == UNKNOWN]
    if len(unknown):
        those = ", ".join(map(str, unknown[:20]))
        yield Fault(
            "masks with wrong ids",
            f"{sample.mask}: {those}: neither a class nor ignored; correct the mask, or give the "
            "ids a meaning by dataset.class_map or dataset.ignore",
        )
