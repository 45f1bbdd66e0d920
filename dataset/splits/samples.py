"""Samples: the images of a list, and where their labels or pseudo labels are."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image

from dataset.reading import read_image, read_mask
from utils.errors import UserError


class Sample(NamedTuple):
    """A line of a list.

    Attributes:
        name: the image's path as the list has it, relative to the root; names the sample.
        image: where to read it.
        mask: where its label or pseudo label is; None where there is none.
        ids: what ids in its mask mean, as in ``Kind``.
    """

    name: str
    image: Path
    mask: Path | None
    ids: bytes | None = None


def read_label(sample: Sample) -> Image.Image:
    """Read a sample's label as class ids and 255, whatever ids its file holds: mode L."""
    return read_mask(sample.mask, sample.ids)


def read_sample(sample: Sample) -> tuple[Image.Image, Image.Image]:
    """Read a sample's image, RGB, and its label, mode L."""
    return read_image(sample.image), read_label(sample)


SampleReader = Callable[[Sample], tuple[Image.Image, Image.Image]]  # ``read_sample``, or its like


def pick(samples: Sequence[Sample], names: Iterable[str]) -> list[Sample]:
    """Return the samples of these names, in the names' order."""
    by_name = {sample.name: sample for sample in samples}
    return [by_name[name] for name in names]


def find_pictures(folder: Path) -> list[Sample]:
    """List the pictures below a folder, by name; other files do not count.

    Raises:
        UserError: no such folder, no picture in it, or two whose names differ in the suffix alone.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one with pictures")
    readable = Image.registered_extensions().items()
    known = {suffix for suffix, format_name in readable if format_name in Image.OPEN}
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in known and p.is_file())
    samples: dict[Path, Sample] = {}
    for path in found:
        name = path.relative_to(folder)
        if name.with_suffix("") in samples:
            raise UserError(f"{path}: another picture has this name and would share its mask")
        samples[name.with_suffix("")] = Sample(name.as_posix(), path, None)
    if not samples:
        raise UserError(f"{folder}: holds no picture that Pillow reads; name another folder")
    return list(samples.values())


def mask_file(folder: Path, sample: Sample) -> Path:
    """Tell where a folder of predicted masks keeps that of a sample."""
    return folder / PurePosixPath(sample.name).with_suffix(".png")


def with_pseudo_masks(samples: Iterable[Sample], folder: Path) -> list[Sample]:
    """Return the samples with the pseudo labels that a folder keeps for them."""
    return [sample._replace(mask=mask_file(folder, sample), ids=None) for sample in samples]
