"""An audit in words."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset.catalog import UNKNOWN, Kind, describe, id_table
from dataset.lists import Sample, Splits, find_list, find_root, overlaps, read_list
from dataset.query import QueryRule
from dataset.reading import decoded_size, picture_size, read_ids
from dataset.splits.foreign import read_query_index
from utils import IGNORE
from utils.config.schema import Config
from utils.errors import UserError

T = TypeVar("T")


class Fault(NamedTuple):
    """Something that training refuses.

    Attributes:
        what: the same words for all faults of a sort.
        line: what is wrong in this place, and what to do.
    """

    what: str
    line: str


class Label(NamedTuple):
    """The label of a sample whose files have been read.

    Attributes:
        mask: class ids, mode L; None where there are faults.
        faults: of the image and of the mask.
    """

    mask: Image.Image | None
    faults: list[Fault]


def read_labels(
    samples: Iterable[Sample],
    kind: Kind,
    size_of: Callable[[Path], tuple[int, int]] = picture_size,
) -> Iterator[Label]:
    """Read every image's size and every mask, under a progress bar.

    Args:
        samples: to read.
        kind: tells what ids mean.
        size_of: reads (height, width) of an image; ``decoded_size`` finds truncated ones.
    """
    table = id_table(kind.classes) if kind.ids is None else np.frombuffer(kind.ids, np.int16)
    for sample in tqdm(samples, desc="reading masks", disable=None, leave=False, unit="image"):
        ids, faults = None, []
        size = _attempt(size_of, sample.image, faults)
        if sample.mask is None:
            line = f"{sample.name} stands there without a mask; name it beside it"
            faults.append(Fault("lines without a mask", line))
        else:
            ids = _attempt(read_ids, sample.mask, faults)
        if ids is not None:
            faults += _faults_of(ids, size, sample, table)
        mask = None if faults else Image.fromarray(table[ids].astype(np.uint8))
        yield Label(mask, faults)


def image_faults(samples: Sequence[Sample]) -> list[Fault]:
    """Decode every image, on all cores, and no mask."""
    faults: list[Fault] = []
    bar = tqdm(total=len(samples), desc="reading images", disable=None, leave=False, unit="image")
    with bar, ThreadPoolExecutor() as pool:
        for _ in pool.map(lambda sample: _attempt(decoded_size, sample.image, faults), samples):
            bar.update()
    return sorted(faults)


def class_areas(mask: Image.Image, num_classes: int) -> np.ndarray:
    """Count the pixels of every class.

    Args:
        mask: class ids below ``num_classes``, or 255.
        num_classes: C.

    Returns:
        (C,) int64, without those that are 255.
    """
    ids = np.asarray(mask)
    return np.bincount(ids[ids != IGNORE], minlength=num_classes)


def _attempt(read: Callable[[Path], T], path: Path, faults: list[Fault]) -> T | None:
    """Read a file, or add why it cannot be read to the faults."""
    try:
        return read(path)
    except UserError as error:
        faults.append(Fault(f"files {'unreadable' if path.is_file() else 'missing'}", str(error)))
        return None


def _faults_of(
    ids: np.ndarray, size: tuple[int, int] | None, sample: Sample, table: np.ndarray
) -> Iterator[Fault]:
    if size is not None and size != ids.shape:
        yield Fault(
            "sizes that differ",
            f"{sample.mask}: this mask is {ids.shape[0]} x {ids.shape[1]} and its image "
            f"{sample.image} is {size[0]} x {size[1]} (height x width); they must agree",
        )
    shown = np.unique(ids)
    unknown = shown[table[shown] == UNKNOWN]
    if len(unknown):
        those = ", ".join(map(str, unknown[:20]))
        yield Fault(
            "masks with wrong ids",
            f"{sample.mask}: {those}: neither a class nor ignored; correct the mask, or give the "
            "ids a meaning by dataset.class_map or dataset.ignore",
        )


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


def audit_table(found: Audit) -> str:
    """Lay out an audit: lists, classes of the labeled list, query index, problems."""
    return "\n".join(_lines(found))


def _lines(found: Audit) -> Iterator[str]:
    yield "list         images"
    for name, count in found.images.items():
        yield f"{name:<9}  {count:>8}"
    width = max(len(name) for name in ["labeled", *(each.name for each in found.classes)])
    yield f"\n{'labeled':<{width}}    pixels  images  with {found.min_area:g} of the pixels"
    for name, share, images, guides in found.classes:
        queried = "excluded" if guides is None else guides
        yield f"{name:<{width}}  {share:>8.3%}  {images:>6}  {queried:>8}"
    yield ""
    if found.unreachable:
        yield f"no query can reach {', '.join(found.unreachable)}: lower query.min_area?"
    if found.hardly_reachable:
        yield (
            f"hardly a query reaches {', '.join(found.hardly_reachable)}: in most images that show "
            "them they are smaller"
        )
    if found.index is not None:
        places = ", ".join(f"{count} {place}" for place, count in found.index.items())
        yield f"query index: {sum(found.index.values())} images: {places}"
    for where, what, count, example in found.problems:
        yield f"{where}: {count} {what}: {example}"
    if not found.problems:
        yield "nothing found that training would refuse"
