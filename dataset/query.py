"""Queries: labeled partners of an image; and which images and partners stage 3 keeps."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from dataset.catalog import Kind
from dataset.lists import Sample, SampleReader, read_label, read_sample
from dataset.reading import to_input, to_label
from dataset.transforms import random_view
from utils import IGNORE, IMAGENET, Preprocessing
from utils.config.schema import AugmentSection, QuerySection
from utils.errors import UserError
from utils.files import read_json, write_json, write_text

QueryIndex = dict[int, list[str]]  # class id -> names of its partners, labeled images that show it


class QueryRule(NamedTuple):
    """Which classes of a label can be queried; the one criterion of index and crops."""

    num_classes: int
    min_area: float  # share of the pixels that are not 255
    excluded: frozenset[int]  # class ids that never count

    @classmethod
    def of(cls, section: QuerySection, kind: Kind) -> "QueryRule":
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


class QueriedPrototype(NamedTuple):
    """The partner of an image, for a bank of prototypes. A batch adds a first dimension."""

    shared_class: Tensor | int  # class id that both show, or 255
    position: Tensor | int  # of the partner in the labeled list


class QueriedImage(NamedTuple):
    """The augmented partner of an image, to pass a network. A batch adds a first dimension."""

    shared_class: Tensor | int  # class id that both show, or 255
    image: Tensor  # (3, H, W) float, normalised; shows the shared class
    label: Tensor  # (H, W) long, true


@dataclass(eq=False)
class Querier:
    """Draws partners: labeled images that show a class of the image they are drawn for."""

    labeled: Sequence[Sample]
    index: QueryIndex  # the partners of each class
    rule: QueryRule  # which classes of a crop can be queried
    augment: AugmentSection
    read: SampleReader = read_sample

    def __post_init__(self) -> None:
        """Note where in the list each name is."""
        self._position = {sample.name: position for position, sample in enumerate(self.labeled)}

    def choose(self, name: str, mask: Image.Image, rng: np.random.Generator) -> QueriedPrototype:
        """Choose a labeled image that shows a class of an image's crop.

        If the crop's mask has no class that another labeled image shows, it is any labeled image,
        and ``shared_class`` is 255. An image is its own partner only if there is no other.
        """
        candidates = {
            label: [other for other in self.index.get(label, ()) if other != name]
            for label in self.rule.classes_in(mask)
        }
        reachable = [label for label, names in candidates.items() if names]
        shared = int(rng.choice(reachable)) if reachable else IGNORE
        others = candidates[shared] if reachable else [n for n in self._position if n != name]
        chosen = others[rng.integers(len(others))] if others else name
        return QueriedPrototype(shared, self._position[chosen])

    def draw(
        self,
        name: str,
        mask: Image.Image,
        rng: np.random.Generator,
        preprocessing: Preprocessing = IMAGENET,
    ) -> QueriedImage:
        """Choose a partner as ``choose`` does, and crop it so that it shows the shared class.

        ``shared_class`` is 255 too if the class gets lost where the partner is scaled down.
        """
        shared, position = self.choose(name, mask, rng)
        image, mask = self.read(self.labeled[position])
        target = None
        if shared != IGNORE:  # aim at a pixel of the class
            places = np.flatnonzero(np.asarray(mask) == shared)
            target = divmod(int(places[rng.integers(len(places))]), mask.width)
        view = random_view((image.height, image.width), self.augment, rng, target)
        image, label = view.image(image, preprocessing.interpolation), to_label(view.mask(mask))
        shared = shared if (label == shared).any() else IGNORE
        return QueriedImage(shared, to_input(image, preprocessing), label)


class Selection(NamedTuple):
    """What stage 3 selects for retraining."""

    reliable: list[Sample]  # unlabeled images, best first
    unreliable: list[Sample]
    index: QueryIndex  # the partners that are kept


def split_by_reliability(scores: Mapping[str, float], keep: float) -> tuple[list[str], list[str]]:
    """Return (reliable, unreliable) image names; ``keep`` is the share that is, rounded up.

    A higher score is more reliable; ties go by name.
    """
    ranked = sorted(scores, key=lambda name: (-scores[name], name))
    cut = count_kept(len(ranked), keep)
    return ranked[:cut], ranked[cut:]


def count_kept(count: int, keep: float) -> int:
    """Return how many of ``count`` a share keeps, rounded up."""
    return math.ceil(round(count * keep, 9))  # 100 * 0.07 is a little more than 7


def keep_reliable_partners(
    index: QueryIndex, scores: Mapping[tuple[int, str], float], keep: float
) -> QueryIndex:
    """Keep the more reliable share of each class's partners, rounded up, the only one at least.

    Scores are by (class id, image name), higher is more reliable; who has none is last.
    """
    kept = {}
    for label, names in index.items():
        found = {name: scores.get((label, name), -math.inf) for name in names}
        kept[label], _ = split_by_reliability(found, keep)
    return kept


def write_selection(
    folder: Path,
    images: Mapping[str, float],
    partners: Mapping[tuple[int, str], float],
    index: QueryIndex,
    keep: float,
    classes: Sequence[str],
) -> int:
    """Rank, and write ``reliable.txt``, ``unreliable.txt``, ``query_index.json`` and the scores.

    Args:
        folder: gets the files.
        images: reliability of each unlabeled image.
        partners: reliability by (class id, labeled image), of the ``index`` at least.
        index: class id to names of labeled images.
        keep: share that counts as reliable, of the images and of each class's partners.
        classes: names by class id.

    Returns:
        How many images are reliable.
    """
    halves = split_by_reliability(images, keep)
    for name, half in zip(("reliable", "unreliable"), halves, strict=True):
        write_text(folder / f"{name}.txt", "".join(f"{image}\n" for image in half))
    kept = keep_reliable_partners(index, partners, keep)
    write_json(folder / "query_index.json", {classes[label]: kept[label] for label in kept})
    write_csv(folder / "unlabeled_scores.csv", ("image", "reliability"), images.items())
    rows = [(classes[label], name, score) for (label, name), score in partners.items()]
    write_csv(folder / "labeled_scores.csv", ("class", "image", "reliability"), rows)
    return len(halves[0])


def read_selection(folder: Path, unlabeled: Sequence[Sample], classes: Sequence[str]) -> Selection:
    """Read what ``write_selection`` wrote."""
    by_name = {sample.name: sample for sample in unlabeled}
    reliable, unreliable = (
        [by_name[name] for name in (folder / f"{half}.txt").read_text("utf-8").splitlines()]
        for half in ("reliable", "unreliable")
    )
    named = read_json(folder / "query_index.json")
    index = {classes.index(name): images for name, images in named.items()}
    return Selection(reliable, unreliable, index)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())
