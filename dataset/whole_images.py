"""What inference takes: whole images, without chance."""

from collections.abc import Callable, Container, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dataset.loader import open_loader
from dataset.reading import picture_size, read_image, read_photograph, to_input, to_label
from dataset.splits import Sample, read_label
from utils import IGNORE
from utils.config import InferenceSection
from utils.distributed import mine
from utils.records import WholeImage

ImageReader = Callable[[Path], Image.Image]


class WholeImages(Dataset[WholeImage]):
    """Whole images, without chance, for validation, labeling and selection."""

    def __init__(
        self, samples: Sequence[Sample], long_side: int | None, read: ImageReader = read_image
    ) -> None:
        self._samples, self._long_side, self._read = samples, long_side, read

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._samples)

    def __getitem__(self, index: int) -> WholeImage:
        """Read an image and its mask."""
        sample = self._samples[index]
        image = self._read(sample.image)
        if sample.mask is None:
            label = torch.full((image.height, image.width), IGNORE)
        else:
            label = to_label(read_label(sample))
        if self._long_side is not None:
            shrink = self._long_side / max(image.size)
            if shrink < 1:
                size = [max(1, round(side * shrink)) for side in image.size]
                image = image.resize(size, Image.Resampling.BILINEAR)
        return WholeImage(to_input(image), label, index)


def whole_images(
    samples: Sequence[Sample],
    settings: InferenceSection,
    workers: int,
    done: Container[str] = frozenset(),
) -> DataLoader[WholeImage]:
    """Iterate over whole images; those of one size share batches.

    Of several processes each gets every ``world()``-th batch, composed as one process would.

    Args:
        samples: the list.
        settings: the size of images and batches.
        workers: processes that read.
        done: names to leave out, by whole batches: an image's numbers can depend, in their last
            digits, on the batch that it is in.
    """
    batches = [
        batch
        for batch in _batches_of_one_size(samples, settings.batch_size)
        if not all(samples[index].name in done for index in batch)
    ]
    return open_loader(WholeImages(samples, settings.long_side), mine(batches), workers)


def photographs(
    samples: Sequence[Sample], settings: InferenceSection, workers: int
) -> DataLoader[WholeImage]:
    """Iterate over photographs, turned upright, one by one: ``mine`` of them."""
    dataset = WholeImages(samples, settings.long_side, read_photograph)
    return open_loader(dataset, mine([[index] for index in range(len(samples))]), workers)


def _batches_of_one_size(samples: Sequence[Sample], batch_size: int) -> list[list[int]]:
    """Return positions in the list; batches come in the order of their first images."""
    if batch_size == 1:
        return [[index] for index in range(len(samples))]
    alike: dict[tuple[int, int], list[int]] = {}
    for index, sample in enumerate(samples):
        alike.setdefault(picture_size(sample.image), []).append(index)
    return sorted(
        indices[start : start + batch_size]
        for indices in alike.values()
        for start in range(0, len(indices), batch_size)
    )
