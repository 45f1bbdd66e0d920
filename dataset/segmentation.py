"""What networks are fed: labeled pairs, unlabeled images with partners, whole images."""

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataset.loader import Chance, SampleKey
from dataset.query import Querier
from dataset.reading import (
    picture_size,
    read_image,
    read_photograph,
    to_input,
    to_label,
)
from dataset.splits import Sample, SampleReader, read_label, read_sample
from dataset.transforms import StrongColours, random_view
from utils import IGNORE
from utils.config import AugmentSection, InferenceSection

ImageReader = Callable[[Path], Image.Image]


class QueryPair(NamedTuple):
    """An image and the labeled image queried for it. A batch adds a first dimension.

    Attributes:
        image: (3, H, W) float, normalised.
        label: (H, W) long, true or pseudo, 255 = ignored.
        query_image: (3, H, W) float, normalised.
        query_label: (H, W) long, true.
        shared_class: class id, 255 if the pair shares none.
    """

    image: Tensor
    label: Tensor
    query_image: Tensor
    query_label: Tensor
    shared_class: Tensor | int


class RetrainSample(NamedTuple):
    """What a retraining step needs of an unlabeled image. A batch adds a first dimension.

    Attributes:
        pair: the unlabeled image as the teacher sees it, its pseudo label, and its partner.
        student_image: (3, H, W) float, normalised, the same crop in strong colours.
        labeled_image: (3, H, W) float, normalised, of another labeled image.
        labeled_label: (H, W) long, true.
    """

    pair: QueryPair
    student_image: Tensor
    labeled_image: Tensor
    labeled_label: Tensor


class LabeledPairs(Dataset[QueryPair]):
    """Stage 1: every labeled image with a partner; the list is passed ``repeat`` times an epoch."""

    def __init__(
        self,
        labeled: Sequence[Sample],
        querier: Querier,
        augment: AugmentSection,
        chance: Chance,
        repeat: int = 1,
        read: SampleReader = read_sample,
    ) -> None:
        self._labeled, self._querier, self._augment = labeled, querier, augment
        self._chance, self._repeat, self._read = chance, repeat, read

    def __len__(self) -> int:
        """Return the number of pairs an epoch."""
        return len(self._labeled) * self._repeat

    def __getitem__(self, key: SampleKey) -> QueryPair:
        """Read, augment and pair a labeled image."""
        rng = self._chance.of(*key)
        sample = self._labeled[key.index % len(self._labeled)]
        image, mask = _weak_view(*self._read(sample), self._augment, rng)
        query = self._querier.draw(sample.name, mask, rng)
        return QueryPair(
            to_input(image),
            to_label(mask),
            to_input(query.image),
            to_label(query.mask),
            query.shared_class,
        )


class RetrainSamples(Dataset[RetrainSample]):
    """Stages 4 and 6: every pseudo-labeled image with a partner and a labeled image.

    The labeled list repeats until it is as long as the unlabeled one; an epoch's turn of it
    starts one further, so that it is not always the same two images that meet.

    Args:
        unlabeled: their masks are pseudo labels.
        labeled: the labeled images.
        querier: draws partners for the unlabeled images.
        augment: the weak augmentation of all three, and the strong one of the first.
        chance: of the stage.
        strong_teacher: show the teacher the strong colours too, as the published code does.
        read: reads an image and its label.
    """

    def __init__(
        self,
        unlabeled: Sequence[Sample],
        labeled: Sequence[Sample],
        querier: Querier,
        augment: AugmentSection,
        chance: Chance,
        strong_teacher: bool = False,
        read: SampleReader = read_sample,
    ) -> None:
        self._unlabeled, self._labeled, self._querier = unlabeled, labeled, querier
        self._read = read
        self._augment, self._chance, self._strong_teacher = augment, chance, strong_teacher
        self._colours = StrongColours(augment.strong)

    def __len__(self) -> int:
        """Return the number of unlabeled images."""
        return len(self._unlabeled)

    def __getitem__(self, key: SampleKey) -> RetrainSample:
        """Read and augment an unlabeled image, its partner and a labeled image."""
        rng = self._chance.of(*key)
        sample = self._unlabeled[key.index]
        weak, mask = _weak_view(*self._read(sample), self._augment, rng)
        strong = to_input(self._colours(weak, rng))
        query = self._querier.draw(sample.name, mask, rng)
        labeled = self._labeled[(key.index + key.epoch) % len(self._labeled)]
        labeled_image, labeled_mask = _weak_view(*self._read(labeled), self._augment, rng)
        pair = QueryPair(
            strong if self._strong_teacher else to_input(weak),
            to_label(mask),
            to_input(query.image),
            to_label(query.mask),
            query.shared_class,
        )
        return RetrainSample(pair, strong, to_input(labeled_image), to_label(labeled_mask))


class WholeImage(NamedTuple):
    """An image as inference takes it. A batch adds a first dimension.

    Attributes:
        image: (3, h, w) float, normalised, shrunk to ``long_side`` if there is one.
        label: (H, W) long at the file's own size, 255 everywhere if the sample has no mask.
        index: position in the list.
    """

    image: Tensor
    label: Tensor
    index: Tensor | int


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
    samples: Sequence[Sample], settings: InferenceSection, workers: int
) -> DataLoader[WholeImage]:
    """Iterate over whole images in the list's order; neighbours of one size share a batch."""
    batches = _batches_of_one_size(samples, settings.batch_size)
    return _loader(WholeImages(samples, settings.long_side), batches, workers)


def photographs(
    samples: Sequence[Sample], settings: InferenceSection, workers: int
) -> DataLoader[WholeImage]:
    """Iterate over photographs, turned upright, one by one."""
    dataset = WholeImages(samples, settings.long_side, read_photograph)
    return _loader(dataset, [[index] for index in range(len(samples))], workers)


def _loader(dataset: WholeImages, batches: list[list[int]], workers: int) -> DataLoader[WholeImage]:
    pinned = torch.cuda.is_available()
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pinned)


def _batches_of_one_size(samples: Sequence[Sample], batch_size: int) -> list[list[int]]:
    if batch_size == 1:
        return [[index] for index in range(len(samples))]
    sizes = [picture_size(sample.image) for sample in samples]
    runs = [list(run) for _, run in groupby(range(len(samples)), key=sizes.__getitem__)]
    return [run[i : i + batch_size] for run in runs for i in range(0, len(run), batch_size)]


def _weak_view(
    image: Image.Image, mask: Image.Image, augment: AugmentSection, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """Cut the same random view from image and mask."""
    view = random_view((image.height, image.width), augment, rng)
    return view.image(image), view.mask(mask)
