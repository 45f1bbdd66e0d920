"""Make a labeled and an unlabeled list from a training list."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np

from dataset.catalog import DatasetInfo
from dataset.lists import ABSENT, Sample, Splits, find_faults, line_of, read_list, write_lists
from dataset.query import QueryRule
from utils.errors import UserError

Shown = frozenset[tuple[int, bool]]  # (class id, whether a query can find it) of a label


def make_lists(
    train: Path,
    share: Fraction | int,
    seed: int,
    folder: Path,
    root: Path = Path(),
    kind: DatasetInfo | None = None,
    keep_classes: QueryRule | None = None,
) -> list[str]:
    """Write ``labeled.txt`` and ``unlabeled.txt``; what is labeled does not depend on list order.

    With the same seed (and rule) a smaller labeled list is part of a larger one: both begin one
    sequence, random but for the images of ``cover`` at its start if classes are to be kept.

    ``keep_classes`` labels every class, on enough pixels for this rule, where possible, and reads
    the masks below the root; None draws at random and opens none. ``kind`` tells where the files of
    bare ids are. Returns what was done, in lines; also the classes that no labeled image shows.

    Raises:
        UserError: a list that cannot be read or written, a mask that is missing or bad.
    """

    def order(sample: Sample) -> bytes:  # at random: a hash of the seed and the name
        return hashlib.sha256(f"{seed} {sample.name}".encode()).digest()

    samples = sorted(read_list(train, root, kind), key=order)
    for sample in samples:
        if sample.mask is None:
            raise UserError(f"{train}: {sample.name} has no mask; name it beside it")
    count, lost = count_labeled(len(samples), share), []
    if keep_classes is not None:
        shown = _shown(samples, keep_classes, kind)
        rows = list(dict.fromkeys([*cover(shown), *range(len(samples))]))
        samples = [samples[row] for row in rows]
        lost = _lost([shown[row] for row in rows[:count]], keep_classes, kind)
    labeled = sorted(line_of(sample, root) for sample in samples[:count])
    unlabeled = sorted(sample.name for sample in samples[count:])
    write_lists(folder, {"labeled": labeled, "unlabeled": unlabeled})
    return [
        f"{folder / 'labeled.txt'}: {count} of {len(samples)} images",
        f"{folder / 'unlabeled.txt'}: the other {len(unlabeled)}, without masks",
        *lost,
    ]


def count_labeled(total: int, share: Fraction | int) -> int:
    """Return how many of ``total`` images are labeled: rounded up, as in the published lists.

    Raises:
        UserError: none would be labeled, or all.
    """
    count = share if isinstance(share, int) else math.ceil(total * share)
    if not 0 < count < total:
        raise UserError(
            f"{share}: that labels {count} of {total} images; label one at least, and not all"
        )
    return count


def cover(shown: Sequence[Shown]) -> list[int]:
    """Choose rows, greedily, until all that any row shows is shown.

    The rarest thing that is still missing comes first; of the rows that show it, the one that
    shows most of what is missing; of such rows the earliest.
    """
    missing = Counter(chain.from_iterable(shown))
    chosen: list[int] = []
    while missing:
        rarest = min(missing, key=lambda thing: (missing[thing], thing))
        rows = [row for row, things in enumerate(shown) if rarest in things]
        chosen.append(max(rows, key=lambda row: len(shown[row] & missing.keys())))
        for thing in shown[chosen[-1]]:
            missing.pop(thing, None)
    return chosen


def _shown(samples: Sequence[Sample], rule: QueryRule, kind: DatasetInfo) -> list[Shown]:
    shown: list[Shown] = []

    def note(_: str, label: np.ndarray) -> None:
        present = {(int(number), False) for number in rule.areas(label).nonzero()[0]}
        shown.append(frozenset(present | {(number, True) for number in rule.classes_in(label)}))

    for fault in find_faults(Splits(list(samples), [], []), kind, visit=note):
        if fault.what != ABSENT:  # ``make`` tells this of the list that it draws
            raise UserError(fault.line)
    return shown


def _lost(shown: Sequence[Shown], rule: QueryRule, kind: DatasetInfo) -> Iterator[str]:
    """Say which classes none of these labels shows, or none shows enough of for a query."""
    seen = frozenset().union(*shown)
    for enough, how in ((False, ""), (True, f" on {rule.min_area:g} of its pixels")):
        wanted = set(range(rule.num_classes)) - (rule.excluded if enough else set())
        names = [kind.classes[label] for label in sorted(wanted) if (label, enough) not in seen]
        if names:
            yield f"no labeled image shows {', '.join(names)}{how}"
