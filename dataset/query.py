"""Queries: for an image, a labeled image that shows one of its classes (METHOD pieces 5 and 6)."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset.catalog import Kind
from dataset.splits import Sample, SampleReader, read_label, read_sample
from dataset.transforms import random_view
from utils import IGNORE
from utils.config import AugmentSection, QuerySection
from utils.errors import UserError

QueryIndex = dict[int, list[str]]  # class id -> names of labeled images that show it


class QueryRule(NamedTuple):
    """Which classes of a label can be queried; the one criterion of index and crops.

    Attributes:
        num_classes: C.
        min_area: share of the pixels that are not 255.
        excluded: class ids that never count.
    """

    num_classes: int
    min_area: float
    excluded: frozenset[int]

    @classmethod
    def of(cls, section: QuerySection, kind: Kind) -> "QueryRule":
        """Read the rule off a config.

        Raises:
            UserError: ``query.exclude`` names no class.
        """
        for name in section.exclude:
            if name not in kind.classes:
                raise UserError(
                    f"query.exclude: '{name}' is no class; there are {', '.join(kind.classes)}"
                )
        excluded = frozenset(kind.classes.index(name) for name in section.exclude)
        return cls(len(kind.classes), section.min_area, excluded)

    def classes_in(self, mask: Image.Image) -> list[int]:
        """Return the ids, ascending, that a mask shows with enough area; none if all is 255."""
        ids = np.asarray(mask)
        area = np.bincount(ids[ids != IGNORE], minlength=self.num_classes)
        enough = area >= max(1.0, self.min_area * area.sum())
        return [int(label) for label in np.flatnonzero(enough) if label not in self.excluded]


def build_query_index(labeled: Iterable[Sample], rule: QueryRule) -> QueryIndex:
    """List, for each class, the labeled images that show it. Reads true masks of labeled images.

    Returns:
        Class id to names in the list's order; classes that nothing shows have no entry.
    """
    index: QueryIndex = {}
    for sample in labeled:
        for label in rule.classes_in(read_label(sample)):
            index.setdefault(label, []).append(sample.name)
    return dict(sorted(index.items()))


class Choice(NamedTuple):
    """A labeled image chosen for another image.

    Attributes:
        position: in the labeled list.
        shared_class: class id that both show, or 255.
    """

    position: int
    shared_class: int


class Query(NamedTuple):
    """A labeled image drawn for another image.

    Attributes:
        image: RGB crop.
        mask: its true label, of equal size.
        shared_class: class id that both show, or 255.
    """

    image: Image.Image
    mask: Image.Image
    shared_class: int


class Querier:
    """Draws labeled partners.

    Args:
        labeled: the labeled images.
        index: which of them show which class.
        rule: which classes of a crop can be queried.
        augment: how the partner is augmented.
        read: reads a sample's image and label.
    """

    def __init__(
        self,
        labeled: Sequence[Sample],
        index: QueryIndex,
        rule: QueryRule,
        augment: AugmentSection,
        read: SampleReader = read_sample,
    ) -> None:
        self._labeled = labeled
        self._position = {sample.name: position for position, sample in enumerate(labeled)}
        self._index = index
        self._rule = rule
        self._augment = augment
        self._read = read

    def choose(self, name: str, mask: Image.Image, rng: np.random.Generator) -> Choice:
        """Choose a partner for the crop of an image.

        Args:
            name: of the image, which is never its own partner (unless it is all there is).
            mask: the crop's label or pseudo label, as the network will see it.
            rng: the sample's random numbers.

        Returns:
            A labeled image that shows a class of the mask. If the mask has no class that another
            labeled image shows, any labeled image, and ``shared_class`` is 255.
        """
        candidates = {
            label: [other for other in self._index.get(label, ()) if other != name]
            for label in self._rule.classes_in(mask)
        }
        reachable = [label for label, names in candidates.items() if names]
        shared = int(rng.choice(reachable)) if reachable else IGNORE
        others = candidates[shared] if reachable else [n for n in self._position if n != name]
        chosen = others[rng.integers(len(others))] if others else name
        return Choice(self._position[chosen], shared)

    def draw(self, name: str, mask: Image.Image, rng: np.random.Generator) -> Query:
        """Choose a partner as ``choose`` does, read it and aim its crop at the shared class.

        Returns:
            The partner; ``shared_class`` is 255 too if the class, thinner than a pixel after
            scaling, is not in its crop.
        """
        position, shared = self.choose(name, mask, rng)
        partner = self._labeled[position]
        image, label = self._read(partner)
        target = _pixel_of(shared, label, rng) if shared != IGNORE else None
        view = random_view((image.height, image.width), self._augment, rng, target)
        image, label = view.image(image), view.mask(label)
        visible = bool((np.asarray(label) == shared).any())
        return Query(image, label, shared if visible else IGNORE)


def _pixel_of(label: int, mask: Image.Image, rng: np.random.Generator) -> tuple[int, int]:
    """Draw a pixel (row, column) of a class that the mask shows."""
    places = np.flatnonzero(np.asarray(mask) == label)
    row, column = divmod(int(places[rng.integers(len(places))]), mask.width)
    return row, column
