"""Queries: labeled images that show a class of another image, its partners (sections 5 and 6)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from dataset.aim import random_pixel
from dataset.catalog import DatasetInfo
from dataset.lists import Sample, SampleReader, read_label, read_sample
from dataset.reading import to_input, to_label
from dataset.transforms import random_view
from utils import IGNORE, IMAGENET, Preprocessing
from utils.config.schema import AugmentSection, QuerySection
from utils.errors import UserError

QueryIndex = dict[int, list[str]]  # class id -> names of its partners, labeled images that show it


class QueryRule(NamedTuple):
    """Which classes of a label can be queried; the one criterion of index and crops."""

    num_classes: int
    min_area: float  # share of the pixels that are not 255
    excluded: frozenset[int]  # class ids that never count

    @classmethod
    def of(cls, section: QuerySection, kind: DatasetInfo) -> "QueryRule":
        """Read the rule off a config; a ``UserError`` if ``query.exclude`` names no class."""
        for name in {*section.exclude} - {*kind.classes}:
            known = ", ".join(kind.classes)
            raise UserError(f"query.exclude: '{name}' is no class; there are {known}")
        excluded = frozenset(kind.classes.index(name) for name in section.exclude)
        return cls(len(kind.classes), section.min_area, excluded)

    def areas(self, mask: Image.Image | np.ndarray) -> np.ndarray:
        """Count the pixels of every class that are not 255: (C,) int64."""
        ids = np.asarray(mask)
        return np.bincount(ids[ids != IGNORE], minlength=self.num_classes)

    def classes_in(self, mask: Image.Image | np.ndarray) -> list[int]:
        """Return the ids, ascending, that a mask shows with enough area; none if all is 255."""
        area = self.areas(mask)
        enough = area >= max(1.0, self.min_area * area.sum())
        return [int(label) for label in np.flatnonzero(enough) if label not in self.excluded]


def build_query_index(labeled: Iterable[Sample], rule: QueryRule) -> QueryIndex:
    """List, for each class that is shown, the labeled images that show it, in the list's order."""
    index: QueryIndex = {}
    for sample in labeled:
        for label in rule.classes_in(read_label(sample)):
            index.setdefault(label, []).append(sample.name)
    return dict(sorted(index.items()))


class Partner(NamedTuple):
    """The augmented partner of an image. A batch adds a first dimension."""

    shared_class: Tensor | int  # class id that both show, or 255
    image: Tensor  # (3, H, W) float, normalised; shows the shared class
    label: Tensor  # (H, W) long, true


class NoPartner(NamedTuple):
    """Stands where no partner is queried."""


@dataclass(eq=False)
class Querier:
    """Draws partners: labeled images that show a class of the image they are drawn for."""

    labeled: Sequence[Sample]
    index: QueryIndex  # the partners of each class
    rule: QueryRule  # which classes of a crop can be queried
    augment: AugmentSection
    read: SampleReader = read_sample

    def __post_init__(self) -> None:
        """Find samples by their names."""
        self._samples = {sample.name: sample for sample in self.labeled}

    def choose(self, name: str, mask: Image.Image, rng: np.random.Generator) -> tuple[int, str]:
        """Choose a labeled image that shows a class of an image's crop: the class and its name.

        If the crop's mask has no class that another labeled image shows, it is any labeled image,
        and the class is 255. An image is its own partner only if there is no other.
        """
        candidates = {
            label: [other for other in self.index.get(label, ()) if other != name]
            for label in self.rule.classes_in(mask)
        }
        reachable = [label for label, names in candidates.items() if names]
        shared = int(rng.choice(reachable)) if reachable else IGNORE
        others = candidates[shared] if reachable else [n for n in self._samples if n != name]
        return shared, others[rng.integers(len(others))] if others else name

    def draw(
        self,
        name: str,
        mask: Image.Image,
        rng: np.random.Generator,
        preprocessing: Preprocessing = IMAGENET,
    ) -> Partner:
        """Choose a partner as ``choose`` does, and crop it so that it shows the shared class.

        ``shared_class`` is 255 too if the class gets lost where the partner is scaled down.
        """
        shared, partner = self.choose(name, mask, rng)
        image, mask = self.read(self._samples[partner])
        target = random_pixel(mask, shared, rng) if shared != IGNORE else None
        view = random_view((image.height, image.width), self.augment, rng, target)
        image, label = view.image(image, preprocessing.interpolation), to_label(view.mask(mask))
        shared = shared if (label == shared).any() else IGNORE
        return Partner(shared, to_input(image, preprocessing), label)
