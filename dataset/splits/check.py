"""What ``python -m dataset.splits check`` looks for and prints."""

from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from dataset.catalog import describe
from dataset.lists import find_faults, read_lists
from dataset.query import QueryRule
from utils.config.schema import Config


class Problem(NamedTuple):
    """All ``Fault`` of one sort in one place, with the first as an example."""

    where: str
    what: str
    count: int
    example: str


class ClassCount(NamedTuple):
    """A class in the labeled images whose files have no fault."""

    name: str
    share: float  # of the pixels that are not ignored, in [0, 1]
    images: int  # those that show it on one pixel or more
    partners: int | None  # those that a query can draw; None for a class that is never queried


class Audit(NamedTuple):
    """What ``audit`` found."""

    images: dict[str, int]  # how many, by list
    min_area: float  # ``query.min_area``
    classes: list[ClassCount]  # of the labeled list, by class id
    unreachable: list[str]  # classes of which no labeled image shows enough
    hardly_reachable: list[str]  # fewer than half of the images with the class show enough
    problems: list[Problem]  # what training refuses

    def to_json(self) -> dict[str, Any]:
        """Return it in dictionaries and lists."""
        return {
            **self._asdict(),
            "classes": [each._asdict() for each in self.classes],
            "problems": [each._asdict() for each in self.problems],
        }


def audit(config: Config) -> Audit:
    """Read the lists of a config and decode their files, but no masks of unlabeled images.

    Raises:
        UserError: what leaves nothing to look at: no root, an unknown kind or class name.
    """
    kind = describe(config.dataset)
    rule = QueryRule.of(config.query, kind)
    splits, unread = read_lists(config.dataset, kind)
    areas, images, partners = np.zeros((3, rule.num_classes), dtype=np.int64)

    def count(where: str, label: np.ndarray) -> None:
        if where == "labeled":
            area = rule.areas(label)
            areas[:] += area
            images[:] += area > 0
            partners[rule.classes_in(label)] += 1

    lines = defaultdict(list)
    for fault in chain(unread, find_faults(splits, kind, decode=True, visit=count)):
        lines[fault.where, fault.what].append(fault.line)
    classes = [
        ClassCount(name, float(share), int(shown), None if number in rule.excluded else int(large))
        for number, (name, share, shown, large) in enumerate(
            zip(kind.classes, areas / max(1, areas.sum()), images, partners, strict=True)
        )
    ]
    return Audit(
        {name: len(samples) for name, samples in splits._asdict().items()},
        rule.min_area,
        classes,
        [each.name for each in classes if each.partners == 0],
        [each.name for each in classes if each.partners and 2 * each.partners < each.images],
        [Problem(*sort, len(found), found[0]) for sort, found in lines.items()],
    )


def audit_table(found: Audit) -> str:
    """Lay out an audit: lists, classes of the labeled list, problems."""
    return "\n".join(_lines(found))


def _lines(found: Audit) -> Iterator[str]:
    yield "list         images"
    for name, count in found.images.items():
        yield f"{name:<9}  {count:>8}"
    width = max(len(name) for name in ["labeled", *(each.name for each in found.classes)])
    yield f"\n{'labeled':<{width}}    pixels  images  with {found.min_area:g} of the pixels"
    for name, share, images, partners in found.classes:
        queried = "excluded" if partners is None else partners
        yield f"{name:<{width}}  {share:>8.3%}  {images:>6}  {queried:>8}"
    yield ""
    if found.unreachable:
        yield f"no query can reach {', '.join(found.unreachable)}: lower query.min_area?"
    if found.hardly_reachable:
        yield (
            f"few queries can reach {', '.join(found.hardly_reachable)}: they are smaller in most "
            "images that show them"
        )
    for where, what, count, example in found.problems:
        yield f"{where}: {count} {what}: {example}"
    if not found.problems:
        yield "nothing found that training would refuse"
