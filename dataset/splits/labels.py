"""What the files of samples hold: labels, and every fault instead of the first."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset.catalog import Kind
from dataset.reading import picture_size, read_mask
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
        faults: of the image's header and of the mask.
    """

    mask: Image.Image | None
    faults: list[Fault]


def read_labels(samples: Iterable[Sample], kind: Kind) -> Iterator[Label]:
    """Read every image's size and every mask, under a progress bar."""
    for sample in tqdm(samples, desc="reading masks", disable=None, leave=False, unit="image"):
        mask, faults = None, []
        size = _attempt(picture_size, sample.image, faults)
        if sample.mask is None:
            line = f"{sample.name} stands there without a mask; name it beside it"
            faults.append(Fault("lines without a mask", line))
        else:
            mask = _attempt(read_mask, sample.mask, faults)
        if mask is not None:
            faults += _faults_of(mask, size, sample, len(kind.classes))
        yield Label(None if faults else mask, faults)


def image_faults(samples: Iterable[Sample]) -> list[Fault]:
    """Read every image's header, and no mask."""
    faults: list[Fault] = []
    for sample in tqdm(samples, desc="reading images", disable=None, leave=False, unit="image"):
        _attempt(picture_size, sample.image, faults)
    return faults


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
    mask: Image.Image, size: tuple[int, int] | None, sample: Sample, num_classes: int
) -> Iterator[Fault]:
    if size is not None and size != (mask.height, mask.width):
        yield Fault(
            "sizes that differ",
            f"{sample.mask}: this mask is {mask.height} x {mask.width} and its image "
            f"{sample.image} is {size[0]} x {size[1]} (height x width); they must agree",
        )
    ids = np.unique(np.asarray(mask))
    wrong = ids[(ids >= num_classes) & (ids != IGNORE)]
    if len(wrong):
        yield Fault(
            "masks with wrong ids",
            f"{sample.mask}: id {wrong[0]} is no class: ids go from 0 to "
            f"{num_classes - 1}, and {IGNORE} is ignored",
        )
