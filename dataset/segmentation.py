"""What networks are trained on: labeled pairs, unlabeled images with what they query."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from dataset.loader import Chance, SampleKey
from dataset.query import Querier
from dataset.reading import to_input, to_label
from dataset.splits import Sample, SampleReader, read_sample
from dataset.transforms import StrongColours, random_view
from utils.config import AugmentSection
from utils.records import Queried, QueriedImage, QueriedPrototype, QueryPair, RetrainSample


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

    def names(self, keys: Iterable[SampleKey]) -> list[str]:
        """Tell which images keys ask for, beside the partners drawn for them."""
        return [self._labeled[key.index % len(self._labeled)].name for key in keys]

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
    starts one further, so that it is not always the same two images that meet. Where it is the
    longer one, each epoch goes on where the last one ended.

    Args:
        unlabeled: their masks are pseudo labels.
        labeled: the labeled images.
        query: finds what guides an unlabeled image, by its name and the crop of its pseudo label;
            ``queried_image`` or ``queried_prototype`` with a querier.
        augment: the weak augmentation of all, and the strong one of unlabeled images.
        chance: of the stage.
        strong_teacher: show the teacher the strong colours too, as the published code does.
        read: reads an image and its label.
    """

    def __init__(
        self,
        unlabeled: Sequence[Sample],
        labeled: Sequence[Sample],
        query: Callable[[str, Image.Image, np.random.Generator], Queried],
        augment: AugmentSection,
        chance: Chance,
        strong_teacher: bool = False,
        read: SampleReader = read_sample,
    ) -> None:
        self._unlabeled, self._labeled, self._query = unlabeled, labeled, query
        self._read = read
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
        count = len(self._labeled)
        if count <= len(self):
            return self._labeled[(key.index + key.epoch) % count]
        place = key.epoch * len(self) + key.index  # an epoch goes on where the last one ended
        return self._labeled[(place + place // count) % count]

    def __getitem__(self, key: SampleKey) -> RetrainSample:
        """Read and augment an unlabeled image, a labeled image, and what is queried."""
        rng = self._chance.of(*key)
        sample = self._unlabeled[key.index]
        weak, mask = _weak_view(*self._read(sample), self._augment, rng)
        strong = to_input(self._colours(weak, rng))
        labeled_image, labeled_mask = _weak_view(
            *self._read(self._labeled_at(key)), self._augment, rng
        )
        return RetrainSample(
            strong if self._strong_teacher else to_input(weak),
            to_label(mask),
            strong,
            to_input(labeled_image),
            to_label(labeled_mask),
            self._query(sample.name, mask, rng),  # last: other queries leave the views as they are
        )


def queried_image(
    querier: Querier, name: str, mask: Image.Image, rng: np.random.Generator
) -> QueriedImage:
    """Draw a labeled image for the crop of an unlabeled one, and augment it."""
    query = querier.draw(name, mask, rng)
    return QueriedImage(query.shared_class, to_input(query.image), to_label(query.mask))


def queried_prototype(
    querier: Querier, name: str, mask: Image.Image, rng: np.random.Generator
) -> QueriedPrototype:
    """Draw a labeled image for the crop of an unlabeled one; no file is opened."""
    choice = querier.choose(name, mask, rng)
    return QueriedPrototype(choice.shared_class, choice.position)


def _weak_view(
    image: Image.Image, mask: Image.Image, augment: AugmentSection, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """Cut the same random view from image and mask."""
    view = random_view((image.height, image.width), augment, rng)
    return view.image(image), view.mask(mask)
