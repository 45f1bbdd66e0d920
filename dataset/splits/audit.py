"""Look for what would spoil a result in the lists of a config, all of it at once."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset.catalog import Kind, describe
from dataset.query import QueryRule
from dataset.reading import decoded_size
from dataset.splits.foreign import read_query_index
from dataset.splits.labels import Fault, class_areas, image_faults, read_labels
from dataset.splits.lines import read_list
from dataset.splits.lists import Splits, find_list, find_root, overlaps
from dataset.splits.samples import Sample
from utils.config import Config
from utils.errors import UserError

LEAKS = {"unlabeled": "unlabeled", "val": "for validation", "nowhere": "in no list"}


class Problem(NamedTuple):
    """Something that spoils a result, and that training refuses.

    Attributes:
        where: the list, the lists, or the query index.
        what: the same words for all problems of a sort.
        count: how many there are of the sort.
        example: the first in words.
    """

    where: str
    what: str
    count: int
    example: str


class ClassCount(NamedTuple):
    """A class in the labeled images whose files are in order.

    Attributes:
        name: of the class.
        share: of the pixels that are not ignored, in [0, 1].
        images: those that show it on a pixel at least.
        guides: those that a query for it can find, on ``query.min_area`` at least; None for a
            class that ``query.exclude`` names.
    """

    name: str
    share: float
    images: int
    guides: int | None


class Audit(NamedTuple):
    """What ``audit`` found.

    Attributes:
        images: how many, by list.
        min_area: ``query.min_area``.
        classes: of the labeled list, by class id.
        unreachable: classes that no query can find: no labeled image shows enough of them.
        hardly_reachable: classes that it finds in fewer than half of the images that show them.
        index: how many images of a foreign query index, if there is one, stand in which list, the
            first of these; the others are ``nowhere``.
        problems: what spoils a result; none is good.
    """

    images: dict[str, int]
    min_area: float
    classes: list[ClassCount]
    unreachable: list[str]
    hardly_reachable: list[str]
    index: dict[str, int] | None
    problems: list[Problem]

    def to_json(self) -> dict[str, Any]:
        """Return it in dictionaries and lists."""
        return {
            **self._asdict(),
            "classes": [each._asdict() for each in self.classes],
            "problems": [each._asdict() for each in self.problems],
        }


def audit(config: Config, index: Path | None = None) -> Audit:
    """Read the lists of a config and their files. Masks of unlabeled images stay closed.

    Args:
        config: names lists, root, classes and query rule.
        index: a foreign query index, see ``read_query_index``.

    Raises:
        UserError: what leaves nothing to look at: no root, an unknown kind or class name, an
            index that cannot be read.
    """
    kind, root = describe(config.dataset), find_root(config.dataset)
    rule = QueryRule.of(config.query, kind)
    splits, unread = _read_lists(config, root, kind)
    standing, leaks = None, []
    if index is not None:
        standing, leaks = _audit_index(index, read_query_index(index, root, kind), splits)
    both = [
        Problem(f"{each.one}, {each.other}", "images in both", len(each.names), each.line)
        for each in overlaps(splits)
    ]
    classes, labeled_faults = _count_classes(splits.labeled, rule, kind)
    _, val_faults = _count_classes(splits.val, rule, kind)
    faults = {
        "labeled": labeled_faults,
        "unlabeled": image_faults(splits.unlabeled),
        "val": val_faults,
    }
    problems = [problem for where, found in faults.items() for problem in _grouped(where, found)]
    return Audit(
        {name: len(samples) for name, samples in splits._asdict().items()},
        rule.min_area,
        classes,
        [each.name for each in classes if each.guides == 0],
        [each.name for each in classes if each.guides and 2 * each.guides < each.images],
        standing,
        [*leaks, *unread, *both, *problems],
    )


def _read_lists(config: Config, root: Path, kind: Kind) -> tuple[Splits, list[Problem]]:
    """Read what can be read; a list that cannot counts as empty."""
    splits, problems = Splits([], [], []), []
    for name in Splits._fields:
        try:
            samples = read_list(find_list(config.dataset, name, root), root, kind)
        except UserError as error:
            problems.append(Problem(name, "list that cannot be read", 1, str(error)))
        else:
            splits = splits._replace(**{name: samples})
    return splits, problems


def _count_classes(
    samples: Sequence[Sample], rule: QueryRule, kind: Kind
) -> tuple[list[ClassCount], list[Fault]]:
    """Count what labels show; those with faults count nowhere."""
    areas, images, guides = np.zeros((3, rule.num_classes), dtype=np.int64)
    faults: list[Fault] = []
    for label in read_labels(samples, kind, decoded_size):
        faults += label.faults
        if label.mask is not None:
            area = class_areas(label.mask, rule.num_classes)
            areas += area
            images += area > 0
            guides[rule.classes_in(label.mask)] += 1
    if samples and not faults and not areas.any():
        faults.append(
            Fault("list without a pixel that counts", "every pixel of its masks is ignored")
        )
    shares = areas / max(1, areas.sum())
    return [
        ClassCount(
            name,
            float(shares[number]),
            int(images[number]),
            None if number in rule.excluded else int(guides[number]),
        )
        for number, name in enumerate(kind.classes)
    ], faults


def _grouped(where: str, faults: Iterable[Fault]) -> list[Problem]:
    """Count faults of a sort as one problem, in the order in which sorts are met."""
    lines: dict[str, list[str]] = {}
    for fault in faults:
        lines.setdefault(fault.what, []).append(fault.line)
    return [Problem(where, what, len(found), found[0]) for what, found in lines.items()]


def _audit_index(
    path: Path, samples: Sequence[Sample], splits: Splits
) -> tuple[dict[str, int], list[Problem]]:
    """Count where the images of a query index stand; all of them should be labeled."""
    places = dict.fromkeys([*Splits._fields, "nowhere"], 0)
    lists = {name: {each.image.resolve() for each in of} for name, of in splits._asdict().items()}
    for sample in samples:
        file = sample.image.resolve()
        places[next((name for name, files in lists.items() if file in files), "nowhere")] += 1
    problems = [
        Problem(
            "query index",
            f"images {standing}",
            places[place],
            f"{path}: {places[place]} of {len(samples)} images are {standing}: their true masks "
            "would be trained on",
        )
        for place, standing in LEAKS.items()
        if places[place]
    ]
    return places, problems
