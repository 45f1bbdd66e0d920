"""The three lists of a run: read them, and refuse what would spoil a result."""

from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.catalog import Kind, describe
from dataset.ids import UNKNOWN, id_table
from dataset.reading import picture_size, read_ids
from dataset.splits.lines import read_list
from dataset.splits.samples import Sample
from utils import IGNORE
from utils.config import DatasetSection
from utils.errors import UserError


class Splits(NamedTuple):
    """The images of a run; ``unlabeled`` carries no masks, whatever its list says."""

    labeled: list[Sample]
    unlabeled: list[Sample]
    val: list[Sample]

    def digests(self) -> dict[str, str]:
        """Return a sha256 of each list, by its name: of the files it names, in their order."""
        texts = ("\n".join(f"{x.name} {x.mask}" for x in samples) for samples in self)
        digests = (sha256(text.encode("utf-8", "surrogateescape")).hexdigest() for text in texts)
        return dict(zip(self._fields, digests, strict=True))


class Overlap(NamedTuple):
    """Images that stand in two lists.

    Attributes:
        one, other: the lists.
        names: of the images, one at least.
    """

    one: str
    other: str
    names: list[str]

    @property
    def line(self) -> str:
        """What is wrong, and what to do."""
        return (
            f"dataset.{self.one} and dataset.{self.other} share {len(self.names)} images, "
            f"{self.names[0]} among them; an image may stand in one list only"
        )


def read_splits(section: DatasetSection) -> Splits:
    """Read and check the lists of a config, before anything trains.

    Raises:
        UserError: a list is missing, empty or malformed; a path leaves the root or names no file;
            two lists overlap; a mask is not a one-channel picture of class ids or 255, or its
            size differs from its image's.
    """
    kind, root = describe(section), find_root(section)
    labeled, unlabeled, val = (
        read_list(find_list(section, field, root), root, kind) for field in Splits._fields
    )
    splits = Splits(labeled, [sample._replace(mask=None) for sample in unlabeled], val)
    for overlap in overlaps(splits):
        raise UserError(overlap.line)
    for sample in splits.unlabeled:
        picture_size(sample.image)
    check_masks(splits.labeled, kind, "dataset.labeled")
    check_masks(splits.val, kind, "dataset.val")
    return splits


def read_val(section: DatasetSection) -> list[Sample]:
    """Read and check the validation list alone, for evaluating where only that exists.

    Raises:
        UserError: as ``read_splits``.
    """
    kind, root = describe(section), find_root(section)
    samples = read_list(find_list(section, "val", root), root, kind)
    check_masks(samples, kind, "dataset.val")
    return samples


def check_masks(samples: Iterable[Sample], kind: Kind, key: str) -> None:
    """Read every mask once.

    Raises:
        UserError: a sample without mask; a mask that is missing, unreadable, not one channel of
            ids that mean a class or ignored, or not of its image's size.
    """
    table = id_table(kind.classes) if kind.ids is None else np.frombuffer(kind.ids, np.int16)
    valid, unknown = 0, {}
    for sample in samples:
        if sample.mask is None:
            raise UserError(f"{key}: {sample.name} stands there without a mask; name it beside it")
        size, ids = picture_size(sample.image), read_ids(sample.mask)
        if ids.shape != size:
            raise UserError(
                f"{sample.mask}: this mask is {ids.shape[0]} x {ids.shape[1]} and its image "
                f"{sample.image} is {size[0]} x {size[1]} (height x width); they must agree"
            )
        area = np.bincount(ids.ravel())
        shown = np.flatnonzero(area)
        for id_ in shown[table[shown] == UNKNOWN].tolist():
            unknown.setdefault(id_, sample.mask)
        valid += int(area[table[: len(area)] != IGNORE].sum())
    if unknown:
        raise UserError(_complaint(unknown, kind))
    if valid == 0:
        raise UserError(
            f"{key}: every pixel of its masks is ignored; nothing can be learnt or told"
        )


def _complaint(unknown: dict[int, Path], kind: Kind) -> str:
    """Name all ids that mean nothing, a mask that shows one, and what would give them a meaning."""
    ids = sorted(unknown)
    named = ", ".join(map(str, ids[:20])) + (" ..." if len(ids) > 20 else "")
    those = f"{unknown[ids[0]]}: " + (f"id {named} is" if len(ids) == 1 else f"ids {named} are")
    if kind.ids is None:
        return (
            f"{those} no class: ids go from 0 to {len(kind.classes) - 1}, and {IGNORE} is ignored; "
            "dataset.class_map and dataset.ignore give others a meaning"
        )
    return (
        f"{those} neither in dataset.class_map nor in dataset.ignore; add what is missing "
        "('other: null' ignores every id that is not named)"
    )


def find_root(section: DatasetSection) -> Path:
    """Return the folder that paths are relative to.

    Raises:
        UserError: no such folder.
    """
    try:
        root = Path(section.root).expanduser()
        there = root.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"dataset.root: cannot look into {section.root} ({error})") from error
    if not there:
        drawn = f" (python -m dataset.demo {root} draws it)" if section.kind == "demo" else ""
        raise UserError(
            f"dataset.root: {root} is no folder; put the data there{drawn} or set dataset.root=PATH"
        )
    return root


def find_list(section: DatasetSection, field: str, root: Path) -> Path:
    """Find a list in the working folder, then in the root.

    Raises:
        UserError: in neither.
    """
    name = getattr(section, field)
    for candidate in (Path(name), root / name):
        try:
            if candidate.is_file():
                return candidate
        except (OSError, ValueError) as error:
            raise UserError(f"dataset.{field}: cannot look for {candidate} ({error})") from error
    raise UserError(
        f"dataset.{field}: {name} is neither in the working folder nor in {root}; "
        f"set dataset.{field}=PATH"
    )


def overlaps(splits: Splits) -> Iterator[Overlap]:
    """Find what stands in two lists, for every pair of lists that overlaps."""
    files = {  # links followed: one picture under two names is one picture
        field: {_file_of(sample): sample.name for sample in getattr(splits, field)}
        for field in Splits._fields
    }
    for one, other in combinations(Splits._fields, 2):
        shared = sorted(files[one][file] for file in files[one].keys() & files[other].keys())
        if shared:
            yield Overlap(one, other, shared)


def _file_of(sample: Sample) -> Path:
    try:
        return sample.image.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{sample.image}: this link leads nowhere ({error})") from error
