"""The three lists of a run: read them, and refuse what would spoil a result."""

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset.catalog import UNKNOWN, Kind, describe, id_table
from dataset.reading import picture_size, read_ids, read_image, read_mask
from utils import IGNORE
from utils.config.schema import DatasetSection
from utils.errors import UserError
from utils.files import write_text


class Sample(NamedTuple):
    """A line of a list.

    Attributes:
        name: the image's path as the list has it, relative to the root; names the sample.
        image: where to read it.
        mask: where its label or pseudo label is; None where there is none.
        ids: what ids in its mask mean, as in ``Kind``.
    """

    name: str
    image: Path
    mask: Path | None
    ids: bytes | None = None


def read_label(sample: Sample) -> Image.Image:
    """Read a sample's label as class ids and 255, whatever ids its file holds: mode L."""
    return read_mask(sample.mask, sample.ids)


def read_sample(sample: Sample) -> tuple[Image.Image, Image.Image]:
    """Read a sample's image, RGB, and its label, mode L."""
    return read_image(sample.image), read_label(sample)


SampleReader = Callable[[Sample], tuple[Image.Image, Image.Image]]  # ``read_sample``, or its like


def pick(samples: Sequence[Sample], names: Iterable[str]) -> list[Sample]:
    """Return the samples of these names, in the names' order."""
    by_name = {sample.name: sample for sample in samples}
    return [by_name[name] for name in names]


def find_pictures(folder: Path) -> list[Sample]:
    """List the pictures below a folder, by name; other files do not count.

    Raises:
        UserError: no such folder, no picture in it, or two whose names differ in the suffix alone.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one with pictures")
    readable = Image.registered_extensions().items()
    known = {suffix for suffix, format_name in readable if format_name in Image.OPEN}
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in known and p.is_file())
    samples: dict[Path, Sample] = {}
    for path in found:
        name = path.relative_to(folder)
        if name.with_suffix("") in samples:
            raise UserError(f"{path}: another picture has this name and would share its mask")
        samples[name.with_suffix("")] = Sample(name.as_posix(), path, None)
    if not samples:
        raise UserError(f"{folder}: holds no picture that Pillow reads; name another folder")
    return list(samples.values())


def mask_file(folder: Path, sample: Sample) -> Path:
    """Tell where a folder of predicted masks keeps that of a sample."""
    return folder / PurePosixPath(sample.name).with_suffix(".png")


def with_pseudo_masks(samples: Iterable[Sample], folder: Path) -> list[Sample]:
    """Return the samples with the pseudo labels that a folder keeps for them."""
    return [sample._replace(mask=mask_file(folder, sample), ids=None) for sample in samples]


LONGEST = 255  # bytes of a file's name, on the common file systems


def read_list(path: Path, root: Path, kind: Kind) -> list[Sample]:
    """Read ``image [mask]`` lines, or U2PL's bare ids; blank lines do not count.

    A path that holds spaces stands in double quotes.

    Args:
        path: the list; a missing final newline is fine.
        root: folder that the paths in it are relative to.
        kind: tells where bare ids lie.

    Raises:
        UserError: no list, no lines, a malformed or repeated line, a path that leaves the root.
    """
    return samples_of(read_lines(path), path, root, kind)


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file, whatever ends them; a byte order mark is no part of them.

    Raises:
        UserError: no such file, or no UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this list ({error})") from error


def samples_of(
    lines: Iterable[str], path: Path, root: Path, kind: Kind | None, slashes: bool = False
) -> list[Sample]:
    """Parse the lines of ``path`` as ``read_list`` does; without a kind, bare ids are refused."""
    samples: dict[PurePosixPath, Sample] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        sample = read_line(line, f"{path}:{number}", root, kind, slashes)
        key = PurePosixPath(sample.name).with_suffix("")
        if key in samples and samples[key].name == sample.name:
            raise UserError(f"{path}:{number}: {sample.name} is listed twice; remove one line")
        if key in samples:
            raise UserError(
                f"{path}:{number}: {sample.name} and {samples[key].name} would share one predicted "
                "mask; rename one"
            )
        samples[key] = sample
    if not samples:
        raise UserError(f"{path}: this list is empty; it needs an image a line")
    return list(samples.values())


def read_line(
    line: str, place: str, root: Path, kind: Kind | None, slashes: bool = False
) -> Sample:
    """Parse ``image [mask]`` or a bare id.

    Args:
        line: a line of a list.
        place: names it in errors.
        root: folder that paths are relative to.
        kind: tells where bare ids lie.
        slashes: whether paths may begin with a slash, which is left out.

    Raises:
        UserError: another number of words, a path that leaves the root or names nothing, or a
            bare id and no kind that tells where its files lie.
    """
    words = _words(line, place)
    if slashes:
        words = [word.lstrip("/") or word for word in words]
    first, last = PurePosixPath(words[0]), PurePosixPath(words[-1])
    if len(words) > 2 or (first.name and not first.suffix and last.suffix):
        raise UserError(
            f"{place}: a line reads 'image [mask]', not {line!r}; paths with spaces stand in "
            "double quotes"
        )
    if len(words) == 1 and not PurePosixPath(words[0]).suffix:
        if kind is None:
            raise UserError(
                f"{place}: {words[0]} is a bare id; name the data set that tells where its files "
                "lie (import --kind NAME, make --config FILE)"
            )
        words = [kind.image_pattern.format(words[0]), kind.mask_pattern.format(words[0])]
    for word in words:
        if PurePosixPath(word).is_absolute() or ".." in PurePosixPath(word).parts:
            raise UserError(
                f"{place}: {word} leaves the data root {root}; paths are relative to it"
            )
        parts = PurePosixPath(word).parts
        if "\0" in word or not parts or max(len(part.encode()) for part in parts) > LONGEST:
            raise UserError(f"{place}: {word[:LONGEST]!r} names no file; correct the line")
    name = str(PurePosixPath(words[0]))  # one spelling: a//b and a/./b are a/b
    mask = root / words[1] if len(words) == 2 else None
    return Sample(name, root / name, mask, None if kind is None else kind.ids)


def line_of(sample: Sample, root: Path) -> str:
    """Return the line that ``read_line`` reads as this sample."""
    files = [sample.name]
    if sample.mask is not None:
        files.append(sample.mask.relative_to(root).as_posix())
    return " ".join(f'"{file}"' if file.split() != [file] else file for file in files)


def _words(line: str, place: str) -> list[str]:
    if '"' not in line:
        return line.split()  # COCO's lists are long, and shlex is slow
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.quotes, lexer.escape, lexer.commenters = True, '"', "", ""
    try:
        return list(lexer)
    except ValueError as error:
        raise UserError(f"{place}: a double quote is not closed in {line!r}") from error


def write_lists(folder: Path, lists: Mapping[str, Sequence[str]]) -> None:
    """Write lists, none if one may not be; a list that is there is never replaced by another.

    Args:
        folder: gets ``<name>.txt`` for every name.
        lists: lines by name.

    Raises:
        UserError: a list is there with other lines, or the place is not to be written to.
    """
    texts = {
        folder / f"{name}.txt": "".join(f"{line}\n" for line in lines)
        for name, lines in lists.items()
    }
    for path, text in texts.items():
        if path.is_file() and path.read_bytes() != text.encode():
            raise UserError(
                f"{path}: is there with other lines, and a run may depend on them; name another "
                "--out, or remove it"
            )
    for path, text in texts.items():
        write_text(path, text)


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
