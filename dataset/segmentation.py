"""What networks learn from: labeled pairs, and unlabeled images with partners."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dataset.loader import Chance, SampleKey
from dataset.query import Querier
from dataset.reading import (
    read_image,
    read_mask,
    to_input,
    to_label,
)
from dataset.splits import Sample
from dataset.transforms import StrongColours, random_view
from utils.config import AugmentSection


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
    ) -> None:
        self._labeled, self._querier, self._augment = labeled, querier, augment
        self._chance, self._repeat = chance, repeat

    def __len__(self) -> int:
        """Return the number of pairs an epoch."""
        return len(self._labeled) * self._repeat

    def names(self, keys: Iterable[SampleKey]) -> list[str]:
        """Tell which images keys ask for, beside the partners drawn for them."""
        return [self._labeled[key.index % len(self._labeled)].name for key in keys]

    def __getitem__(self, key: SampleKey) -> QueryPair:
        """Read, augment and pair a labeled image."""
        rng = self._chance.of(*key)
        sample = self._labeled[key.index % len(self._labeled)]
        image, mask = _weak_view(sample, self._augment, rng)
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
    """

    def __init__(
        self,
        unlabeled: Sequence[Sample],
        labeled: Sequence[Sample],
        querier: Querier,
        augment: AugmentSection,
        chance: Chance,
        strong_teacher: bool = False,
    ) -> None:
        self._unlabeled, self._labeled, self._querier = unlabeled, labeled, querier
        self._augment, self._chance, self._strong_teacher = augment, chance, strong_teacher
        self._colours = StrongColours(augment.strong)

    def __len__(self) -> int:
        """Return the number of unlabeled images."""
        return len(self._unlabeled)

    def names(self, keys: Iterable[SampleKey]) -> list[str]:
        """Tell which images keys ask for, beside the partners drawn for them."""
        return [
            sample.name
            for key in keys
            for sample in (self._unlabeled[key.index], self._labeled_at(key))
        ]

    def _labeled_at(self, key: SampleKey) -> Sample:
        return self._labeled[(key.index + key.epoch) % len(self._labeled)]

    def __getitem__(self, key: SampleKey) -> RetrainSample:
        """Read and augment an unlabeled image, its partner and a labeled image."""
        rng = self._chance.of(*key)
        sample = self._unlabeled[key.index]
        weak, mask = _weak_view(sample, self._augment, rng)
        strong = to_input(self._colours(weak, rng))
        query = self._querier.draw(sample.name, mask, rng)
        labeled_image, labeled_mask = _weak_view(self._labeled_at(key), self._augment, rng)
        pair = QueryPair(
            strong if self._strong_teacher else to_input(weak),
            to_label(mask),
            to_input(query.image),
            to_label(query.mask),
            query.shared_class,
        )
        return RetrainSample(pair, strong, to_input(labeled_image), to_label(labeled_mask))


def _weak_view(
    sample: Sample, augment: AugmentSection, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """Read a sample and cut the same random view from image and mask."""
    image, mask = read_image(sample.image), read_mask(sample.mask)
    view = random_view((image.height, image.width), augment, rng)
    return view.image(image), view.mask(mask)
