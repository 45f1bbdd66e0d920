"""The three lists of a run: read them, and find what would invalidate a result."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from glob import escape, glob
from itertools import combinations, pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset.catalog import UNKNOWN, DatasetInfo, dataset_info
from dataset.published import published_list
from dataset.reading import (
    AS_STORED,
    COLOURS,
    IDS,
    Pixels,
    Traits,
    examine,
    orientation_of,
    picture_size,
    read_ids,
    read_image,
    read_mask,
)
from utils import IGNORE
from utils.config.schema import DatasetSection
from utils.errors import UserError
from utils.files import sha256, text_digest, write_text
from utils.progress import no_bar


class Sample(NamedTuple):
    """A line of a list."""

    name: str  # the image's path relative to the root; identifies the sample
    image: Path
    mask: Path | None  # of the label or pseudo label, if there is one
    ids: bytes | None = None  # meaning of the ids in the mask, as in ``DatasetInfo``
    pixels: Pixels = AS_STORED  # how the image is read


def read_picture(sample: Sample) -> Image.Image:
    """Read a sample's image: RGB, upright."""
    return read_image(sample.image, sample.pixels)


def read_label(sample: Sample) -> Image.Image:
    """Read a sample's label in mode L: class ids and 255, by the meaning of its file's ids."""
    return read_mask(sample.mask, sample.ids)


def count_class_pixels(samples: Iterable[Sample], num_classes: int) -> list[int]:
    """Count the pixels of each class in the labels of samples."""
    counts = [read_label(sample).histogram()[:num_classes] for sample in samples]
    return [sum(column) for column in zip([0] * num_classes, *counts, strict=True)]


def read_sample(sample: Sample) -> tuple[Image.Image, Image.Image]:
    """Read a sample's image, RGB, and its label, mode L; 0 everywhere if it has no mask."""
    image = read_picture(sample)
    return image, Image.new("L", image.size) if sample.mask is None else read_label(sample)


SampleReader = Callable[[Sample], tuple[Image.Image, Image.Image]]  # ``read_sample``, or its like


def find_pictures(
    place: Path, pixels: Pixels = AS_STORED, taken: Set[object] = frozenset()
) -> list[Sample]:
    """List pictures by name: a file; those below a folder; or those that a pattern fits.

    Files that are no pictures, and hidden ones, do not count. Names begin in the folder that holds
    them all.

    Args:
        place: the file, folder or pattern.
        pixels: how they are read.
        taken: files that are left out, by ``_file_at``.

    Raises:
        UserError: no such place, no picture, or two whose names differ in the suffix alone.
    """
    if place.is_dir():
        folder, candidates = place, place.rglob("*")
    else:
        candidates = files_of(place)
        folder = Path(os.path.commonpath([x.parent for x in candidates] or ["."]))
    found = pictures_among(candidates, folder)
    if not found:
        raise UserError(
            f"{place}: no such file or folder, or no picture that Pillow reads; a pattern such as "
            "'photos/*.jpg' stands in quotes"
        )
    found = [path for path in found if _file_at(path) not in taken]
    for one, other in pairwise(sorted(found, key=lambda path: path.with_suffix(""))):
        if one.with_suffix("") == other.with_suffix(""):
            raise UserError(f"{other}: {one.name} has this name too and would share its mask")
    names = (path.relative_to(folder).as_posix() for path in found)
    return [Sample(*pair, None, pixels=pixels) for pair in zip(names, found, strict=True)]


def files_of(pattern: Path) -> list[Path]:
    """List what fits a pattern, such as ``photos/*.jpg``; a file fits itself, whatever its name."""
    fitting = glob(str(pattern), recursive=True)  # noqa: PTH207 - Path takes no whole pattern
    return [pattern] if pattern.is_file() else [Path(name) for name in fitting]


def pictures_among(files: Iterable[Path], folder: Path) -> list[Path]:
    """Return the files with a picture's suffix, by name; those hidden in a folder do not count."""
    formats = Image.registered_extensions().items()
    known = {suffix for suffix, format_name in formats if format_name in Image.OPEN}
    found = sorted(p for p in files if p.suffix.lower() in known and p.is_file())
    return [p for p in found if not re.search(r"(^|/)\.", p.relative_to(folder).as_posix())]


def readable(samples: Sequence[Sample]) -> tuple[list[Sample], list[str]]:
    """Return the samples whose images can be decoded, and what is wrong with the others."""
    with ThreadPool() as pool:
        found = list(pool.imap(lambda sample: _look("pictures", sample, True), samples))
    whole = [sample for sample, seen in zip(samples, found, strict=True) if type(seen) is Traits]
    return whole, [seen.line for seen in found if isinstance(seen, Fault)]


def mask_file(folder: Path, sample: Sample) -> Path:
    """Return where a folder of predicted masks has that of a sample."""
    return folder / PurePosixPath(sample.name).with_suffix(".png")


def with_pseudo_masks(samples: Iterable[Sample], folder: Path) -> list[Sample]:
    """Return the samples with their pseudo labels in a folder."""
    return [sample._replace(mask=mask_file(folder, sample), ids=None) for sample in samples]


def is_same_list(one: Sequence[Sample], other: Sequence[Sample]) -> bool:
    """Tell whether two lists name the same images with the same masks, wherever these are.

    Files at two places are compared by their content.

    Raises:
        UserError: a file cannot be read.
    """
    if [(x.name, x.ids) for x in one] != [(x.name, x.ids) for x in other]:
        return False
    pairs = [
        (a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x[1:3], y[1:3], strict=True)
    ]
    with ThreadPool() as pool:
        return all(pool.imap(lambda pair: _is_same_file(*pair), pairs))


def _is_same_file(one: Path | None, other: Path | None) -> bool:
    if one is None or other is None or one == other:
        return one == other
    return one.samefile(other) or sha256(one) == sha256(other)


_HALF_OF_16_BITS = 2**15
ABSENT = "classes that no image shows"  # ``what`` of a ``Fault``
_NAMED = 8  # classes at most that a line of advice names
_BY_COMMA = re.compile(r"([^,;\s]+\.\w+)\s*[,;]\s*([^,;\s]+\.\w+)")
_WORD = re.compile(r'"([^"]*)"|([^\s"]+)')


def read_list(path: Path, root: Path, kind: DatasetInfo | None) -> list[Sample]:
    """Read ``image [mask]`` lines, or bare ids as U2PL has them; blank lines do not count.

    Paths are relative to the root, with or without a leading slash, or whole paths in it; slashes
    may lean either way; one that holds spaces stands in double quotes. ``kind`` tells where the
    files of bare ids are; without it these are refused.

    Raises:
        UserError: no list, no lines, a malformed or repeated line, a path that leaves the root.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read this list ({error})") from error
    return _samples_of(lines, path, root, kind)


def _samples_of(
    lines: Iterable[str], path: Path, root: Path, kind: DatasetInfo | None
) -> list[Sample]:
    samples: dict[str, Sample] = {}  # by name without suffix
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        sample = _read_line(line, f"{path}:{number}", root, kind)
        key = str(PurePosixPath(sample.name).with_suffix(""))
        if key in samples:  # two images of one name would share a predicted mask
            raise UserError(
                f"{path}:{number}: {sample.name} is listed twice, as {samples[key].name} before; "
                "remove or rename one"
            )
        samples[key] = sample
    if not samples:
        raise UserError(
            f"{path}: this list is empty; it needs an image a line (12 lists of ST++ and CISC-R "
            "are published empty: take another, or make one by 'python -m dataset.splits make')"
        )
    return list(samples.values())


def _read_line(line: str, place: str, root: Path, kind: DatasetInfo | None) -> Sample:
    if line.count('"') % 2:
        raise UserError(f"{place}: a double quote is not closed in {line!r}")
    words = [quoted or plain for quoted, plain in _WORD.findall(line.replace("\\", "/"))]
    pair = _BY_COMMA.fullmatch(line.strip())
    if pair:
        raise UserError(
            f"{place}: separate image and mask by a space, as in '{pair[1]} {pair[2]}', not by "
            f"'{pair[0][len(pair[1])]}'"
        )
    suffixes = ["." in word.rsplit("/", 1)[-1] for word in words]
    if len(words) > 2 or suffixes == [False, True]:
        raise UserError(
            f"{place}: a line reads 'image [mask]', not {line!r}; paths with spaces stand in "
            "double quotes"
        )
    if suffixes == [False]:
        if kind is None:
            raise UserError(
                f"{place}: {words[0]} is a bare id; --config FILE tells where its files are"
            )
        words = kind.files_of(words[0])
    image, *mask = (_inside(word, place, root) for word in words)
    ids, pixels = (None, AS_STORED) if kind is None else (kind.ids, kind.pixels)
    return Sample(image, root / image, root / mask[0] if mask else None, ids, pixels)


def _inside(word: str, place: str, root: Path) -> str:
    """Spell a path relative to the root in one way: a//b, a/./b, /a/b, <root>/a/b are a/b."""
    below = root.absolute().as_posix().rstrip("/") + "/"
    parts = [part for part in word.removeprefix(below).split("/") if part not in ("", ".")]
    if ".." in parts:
        raise UserError(f"{place}: {word} leaves the data root {root}; paths are relative to it")
    if not parts:
        raise UserError(f"{place}: {word!r} names no file; correct the line")
    whole = word.startswith("/") or re.match(r"[A-Za-z]:/", word)
    if whole and root.is_dir() and not (root / parts[0]).exists():
        raise UserError(
            f"{place}: {word} is not in dataset.root, {root.absolute()}; set dataset.root to the "
            "folder that it is in, or write paths relative to dataset.root"
        )
    return "/".join(parts)


def line_of(sample: Sample, root: Path) -> str:
    """Return the line that reads as this sample."""
    files = [sample.name]
    files += [sample.mask.relative_to(root).as_posix()] if sample.mask else []
    return " ".join(f'"{file}"' if file.split() != [file] else file for file in files)


def write_lists(folder: Path, lists: Mapping[str, Iterable[str]]) -> None:
    """Write the lines of ``<name>.txt`` for every name.

    Raises:
        UserError: a list is there with other lines; none is written.
    """
    texts = {folder / f"{name}.txt": "".join(f"{x}\n" for x in lists[name]) for name in lists}
    for path, text in texts.items():
        if path.is_file() and path.read_bytes() != text.encode():
            raise UserError(
                f"{path}: is there with other lines, and a run may depend on them; rename or "
                "remove it, or name another folder"
            )
    for path, text in texts.items():
        write_text(path, text)


class Splits(NamedTuple):
    """The images of a run; ``unlabeled`` has no masks, even if its list names some."""

    labeled: list[Sample]
    unlabeled: list[Sample]
    val: list[Sample]
    test: Sequence[Sample] = ()  # scored once, when a run ends; may be empty

    def list_digests(self) -> dict[str, str]:
        """Return a sha256 of each list that was read, by its name: of its files, in their order."""
        digests = {}
        for name, samples in zip(self._fields, self, strict=True):
            if not samples:
                continue
            masks = [x.mask and os.path.relpath(x.mask, x.image.parent) for x in samples]
            lines = (f"{x.name} {mask}" for x, mask in zip(samples, masks, strict=True))
            digests[name] = text_digest("\n".join(lines))
        return digests

    def digests(self) -> dict[str, str]:
        """Return ``list_digests``, and by ``<name> files`` a sha256 of the files' sizes and times.

        A data set that is moved keeps the first; copied, it may get other times.
        """
        digests = self.list_digests()
        for name in tuple(digests):
            samples = getattr(self, name)
            stats = [file.stat() for x in samples for file in (x.image, x.mask) if file]
            times = "\n".join(f"{stat.st_size} {stat.st_mtime_ns}" for stat in stats)
            digests[f"{name} files"] = text_digest(times)
        return digests


Note = Callable[[str], None]  # is told what training accepts and a user should know


def _ignore(_: str) -> None:
    pass


def lists_of(stages: Sequence[int]) -> tuple[str, ...]:
    """Return the names of the lists that stages read: stage 1 alone reads no unlabeled images."""
    return tuple(x for x in Splits._fields if x != "unlabeled" or list(stages) != [1])


class Fault(NamedTuple):
    """Something in the lists or their files that training refuses."""

    where: str  # the list, or the two lists
    what: str  # the same words for all faults of a sort
    line: str  # what is wrong, and what to do


def read_splits(
    section: DatasetSection, fields: Sequence[str] = Splits._fields, note: Note = _ignore
) -> Splits:
    """Read the lists of a config, as ``read_lists``, and check them before anything trains.

    Args:
        section: of the data.
        fields: the lists; others are empty.
        note: as ``find_faults`` calls it.

    Raises:
        UserError: as ``read_lists``, or the first fault of ``find_faults``.
    """
    splits = read_lists(section, fields)
    for fault in find_faults(splits, dataset_info(section), note=note):
        raise UserError(fault.line)
    return splits


def refuse_broken_images(splits: Splits) -> list[str]:
    """Decode every image, and return lines on what reading them turns and leaves out.

    Raises:
        UserError: an image cannot be read completely.
    """
    seen = {where: _Seen() for where in Splits._fields}
    for where, samples in zip(Splits._fields, splits, strict=True):
        for fault in _image_faults(where, samples, True, seen[where]):
            raise UserError(fault.line)
    return list(_notes_on(seen))


def read_val(section: DatasetSection) -> list[Sample]:
    """Read and check the validation list alone, for evaluation where only that exists."""
    return read_splits(section, ("val",)).val


def read_truth(section: DatasetSection, name: str | None) -> dict[str, Sample]:
    """Read a list of images with true masks that no training sees: samples by image name.

    Args:
        section: of the data.
        name: of the list in the root, or a whole path; None: there is none.

    Raises:
        UserError: no root, no list, a line that is wrong.
    """
    if name is None:
        return {}
    root, kind = find_root(section), dataset_info(section)
    if not (root / name).is_file():
        raise UserError(
            f"panels.truth: {name} is not in {root}; set panels.truth=null, or name a whole path"
        )
    samples = read_list(root / name, root, kind)
    return {sample.name: sample for sample in samples if sample.mask}


def read_lists(section: DatasetSection, fields: Sequence[str] = Splits._fields) -> Splits:
    """Read the lists of a config, and no picture; lists that are not in ``fields`` are empty.

    Raises:
        UserError: no root; a list that cannot be read; a published split beside lists of one's own.
    """
    root, kind, lists = find_root(section), dataset_info(section), {}
    fields = [field for field in fields if field != "test" or section.test is not None]
    listed = [field for field in fields if field != "test"]  # no published split has one
    own = [x for x in listed if getattr(section, x) != DatasetSection.model_fields[x].default]
    if section.split is not None and own:
        raise UserError(
            f"dataset.{own[0]}: dataset.split names the lists already; set dataset.split=null to "
            "use your own"
        )
    for field in fields:
        place = _place_of_pictures(section.unlabeled, root) if field == "unlabeled" else None
        if section.split is not None and field != "test":
            path, lines = published_list(section.kind, section.split, field, root)
            lists[field] = _samples_of(lines, path, root, kind)
        elif place is not None:
            others = read_lists(section, ("labeled", "val", "test"))
            lists[field] = _pictures_besides(others, root, place, kind.pixels)
        else:
            lists[field] = read_list(_find_list(section, field, root), root, kind)
    splits = Splits(**{"labeled": [], "unlabeled": [], "val": []} | lists)
    # The masks of unlabeled images are never opened.
    return splits._replace(unlabeled=[x._replace(mask=None) for x in splits.unlabeled])


def _place_of_pictures(name: str, root: Path) -> Path | None:
    """Return the folder or glob below the root that stands for a list; None: it is a list."""
    place = root / name  # or the name alone, if it is a whole path
    if place.is_file() or not (place.is_dir() or set(name) & set("*?[")):
        return None
    if not place.is_relative_to(root) or ".." in place.parts[len(root.parts) :]:
        raise UserError(f"dataset.unlabeled: {name} is not below dataset.root, {root}")
    return place if place.is_dir() else Path(escape(str(root))) / place.relative_to(root)


def _pictures_besides(others: Splits, root: Path, place: Path, pixels: Pixels) -> list[Sample]:
    """List the pictures of a place that are no image and no mask of other lists."""
    known = [sample for samples in others for sample in samples]
    taken = {_file_at(path) for x in known for path in (x.image, x.mask) if path}
    found = find_pictures(place, pixels, taken)
    if not found:
        raise UserError(
            f"dataset.unlabeled: {place} has no picture besides those of the other lists"
        )
    return [sample._replace(name=sample.image.relative_to(root).as_posix()) for sample in found]


def find_faults(
    splits: Splits,
    kind: DatasetInfo,
    decode: bool = False,
    visit: Callable[[str, np.ndarray], None] | None = None,
    note: Note = _ignore,
) -> Iterator[Fault]:
    """Find what training must not start with: images in two lists, bad images, bad masks.

    Args:
        splits: the lists.
        kind: tells what ids mean.
        decode: decode the images, which finds truncated ones too; else only headers are read.
        visit: called with the list's name and the label, (H, W) uint8 class ids and 255, of every
            sample whose mask has no fault.
        note: called with a line for each thing that is no fault but changes a result: shares of
            ignored pixels, classes that a list does not show.
    """
    yield from _overlaps(splits)
    seen = {where: _Seen() for where in Splits._fields}
    for where, samples in zip(Splits._fields, splits, strict=True):
        if where == "unlabeled":
            yield from _image_faults(where, samples, decode, seen[where])
            continue
        sound = True
        for fault in _label_faults(where, samples, kind, decode, seen[where], visit):
            sound = False
            yield fault
        if sound:  # else a class may be missing where a mask is
            yield from _class_faults(where, seen[where].pixels, kind, note)
    for line in _notes_on(seen):
        note(line)


class _Seen:
    """What the files of a list show."""

    def __init__(self) -> None:
        self.pixels = Counter[int]()  # of each id in mask files
        self.traits: list[tuple[Sample, Traits]] = []  # of the images that were decoded


def _notes_on(seen: Mapping[str, _Seen]) -> Iterator[str]:
    """Say what reading the images turns and leaves out."""
    for where, found in seen.items():
        turned = [sample.name for sample, traits in found.traits if traits.orientation != 1]
        if turned:
            masks = "" if where == "unlabeled" else "; masks must show the upright image"
            yield (
                f"dataset.{where}: {len(turned)} of {len(found.traits)} images are turned upright "
                f"by their EXIF orientation, {turned[0]} among them{masks}"
            )
    pairs = [pair for found in seen.values() for pair in found.traits]
    cut = [(s, traits) for s, traits in pairs if traits.bands_read < traits.bands]
    if cut:
        sample, traits = cut[0]
        kept = "red, green and blue are" if traits.bands_read == len("RGB") else "one is"
        yield (
            f"dataset.bands: {kept} read of the {traits.bands} bands of {sample.name} "
            f"({len(cut)} of {len(pairs)} images have more than are read); "
            "dataset.bands=[3,2,1], say, picks others, counted from 1"
        )
    highest = [traits.highest for _, traits in pairs if traits.highest is not None]
    if highest and (top := max(highest)) < _HALF_OF_16_BITS:
        yield (
            f"dataset.range: the values of {len(highest)} images of 16 bits end at {top} of 65535: "
            f"{top // 256 + 1} of {top + 1} levels are left; set dataset.range=[0,{top}], or "
            "dataset.range=percentile"
        )


def _overlaps(splits: Splits) -> Iterator[Fault]:
    files = [{_file_at(sample.image): sample.name for sample in samples} for samples in splits]
    for (one, ours), (other, theirs) in combinations(zip(Splits._fields, files, strict=True), 2):
        both = sorted(ours[file] for file in ours.keys() & theirs.keys())
        for _ in both:
            yield Fault(
                f"{one}, {other}",
                "images in both",
                f"dataset.{one} and dataset.{other} share {len(both)} images, {both[0]} among "
                "them; an image may stand in one list only",
            )


def _file_at(path: Path) -> object:
    """Follow links of both kinds: one picture under two names is one picture."""
    try:
        found = path.stat()
        return (found.st_dev, found.st_ino) if found.st_ino else path.resolve()
    except (OSError, RuntimeError, ValueError):  # no path: reading it says what is wrong
        return path


def _image_faults(
    where: str, samples: Sequence[Sample], decode: bool, seen: _Seen
) -> Iterator[Fault]:
    with ThreadPool() as pool:
        found = pool.imap(lambda sample: _look(where, sample, decode), samples)
        for sample, each in zip(samples, _bar(found, where, len(samples)), strict=True):
            if isinstance(each, Fault):
                yield each
            elif each is not None:
                seen.traits.append((sample, each))


def _look(where: str, sample: Sample, decode: bool) -> Fault | Traits | None:
    """Read a sample's image, or its header alone, of which nothing is told."""
    try:
        if decode:
            return examine(sample.image, sample.pixels)
        picture_size(sample.image)
    except UserError as error:
        return Fault(where, "files that cannot be read", str(error))
    return None


def _label_faults(
    where: str,
    samples: Sequence[Sample],
    kind: DatasetInfo,
    decode: bool,
    seen: _Seen,
    visit: Callable[[str, np.ndarray], None] | None,
) -> Iterator[Fault]:
    """Check images and masks one by one."""
    table = kind.table()
    unknown: dict[int, Path] = {}  # id without meaning to a mask that shows it
    for sample in _bar(samples, where, len(samples)):
        if sample.mask is None:
            line = f"dataset.{where}: {sample.name} has no mask; name it beside it"
            yield Fault(where, "lines without a mask", line)
            continue
        try:
            if decode:
                seen.traits.append((sample, examine(sample.image, sample.pixels)))
            size = picture_size(sample.image)
            ids = read_ids(sample.mask, colours=len(table) == COLOURS)
        except UserError as error:
            yield Fault(where, "files that cannot be read", str(error))
            continue
        counts = _counts_of(ids)
        seen.pixels.update(counts)
        shown = np.array(list(counts))
        strange = shown[table[shown] == UNKNOWN].tolist()
        unknown = dict.fromkeys(strange, sample.mask) | unknown
        if ids.shape != size:
            yield Fault(where, "sizes that differ", _size_complaint(sample, size, ids.shape))
        elif not strange and visit is not None:
            visit(where, table[ids].astype(np.uint8))
    for _ in unknown:
        yield Fault(where, "ids without a meaning", _complaint(unknown, kind))


def _counts_of(ids: np.ndarray) -> dict[int, int]:
    """Count the pixels of each id, or colour, that is there."""
    if ids.itemsize < 4:  # far faster, but as long as the highest id
        counts = np.bincount(ids.ravel())
        return {id_: int(counts[id_]) for id_ in np.flatnonzero(counts).tolist()}
    shown, counts = np.unique(ids, return_counts=True)
    return dict(zip(shown.tolist(), counts.tolist(), strict=True))


def _size_complaint(sample: Sample, size: tuple[int, int], of_mask: tuple[int, int]) -> str:
    orientation = orientation_of(sample.image)
    line = (
        f"{sample.mask}: this mask is {of_mask[0]} x {of_mask[1]} and its image {sample.image} is "
        f"{size[0]} x {size[1]} (height x width)"
    )
    if orientation == 1:
        return f"{line}; they must agree"
    return (
        f"{line}, turned upright by its EXIF orientation ({orientation}); turn the mask too, or "
        "where it was drawn on the image as stored remove the orientation "
        f"(exiftool -Orientation= {sample.image})"
    )


def _class_faults(
    where: str, pixels: Counter[int], kind: DatasetInfo, note: Note
) -> Iterator[Fault]:
    """Judge the classes that a list shows, by the pixels of each id in its mask files."""
    table, shown = kind.table(), sorted(pixels)
    counting = [id_ for id_ in shown if table[id_] not in (UNKNOWN, IGNORE)]
    left_out = [id_ for id_ in shown if table[id_] == IGNORE]
    if not counting and not left_out:
        return  # no masks, or none with an id that means something
    if not counting:
        line = f"dataset.{where}: every pixel of its masks is ignored; name other masks"
        yield Fault(where, "list without a pixel that counts", line)
        return
    share = sum(pixels[id_] for id_ in left_out) / pixels.total()
    ids = ", ".join(map(kind.spell, left_out))
    if left_out and len(counting) == 1:
        one, most = map(kind.spell, (counting[0], max(left_out, key=lambda id_: pixels[id_])))
        line = (
            f"dataset.{where}: its masks show id {one} and, ignored, {ids} ({share:.1%} of "
            f"the pixels); if {most} is a class, set {_two_classes(one, most, kind)}; else "
            "name masks of more than one class"
        )
        yield Fault(where, "one class and ignored pixels", line)
        return
    if left_out:
        note(f"dataset.{where}: {share:.1%} of the pixels are ignored, id {ids}")
    absent = [name for id_, name in enumerate(kind.classes) if id_ not in table[counting]]
    if not absent:
        return
    names = " or ".join(f"'{name}'" for name in absent)
    if where != "labeled":
        note(f"dataset.{where}: no image shows {names}; mIoU counts it only where it is predicted")
    elif kind.own:
        line = f"dataset.labeled: no labeled image shows {names}; label one that does"
        yield Fault(where, ABSENT, line + _without(absent, kind))
    else:  # a published list is as it is
        note(f"dataset.labeled: no labeled image shows {names}, which will not be learnt")


def _two_classes(first: str, second: str, kind: DatasetInfo) -> str:
    """Return the settings that make classes of two ids in mask files."""
    one, two = kind.classes if len(kind.classes) == 2 else ("background", "object")
    words = [f'"dataset.class_map={{{first}: {one}, {second}: {two}}}"', '"dataset.ignore=[]"']
    if len(kind.classes) != 2:
        words.insert(0, f'dataset.kind=custom "dataset.classes=[{one}, {two}]"')
    return " ".join(words)


def _without(absent: Sequence[str], kind: DatasetInfo) -> str:
    """Return the way to train without some classes; nothing where one class would be left."""
    kept = [name for name in kind.classes if name not in absent]
    if len(kept) < 2:
        return ""
    table = kind.table()
    meanings = {id_: table[id_] for id_ in np.flatnonzero(table != UNKNOWN).tolist()}
    if kind.ids is None:
        meanings.pop(IGNORE, None)  # by dataset.ignore
    if len(meanings) > _NAMED:
        what = "colour" if len(table) > IDS else "ids"
        return f", or take it out of dataset.classes and make its {what} null in dataset.class_map"
    names = {id_: name for id_, name in enumerate(kind.classes) if name in kept}
    class_map = ", ".join(f"{kind.spell(x)}: {names.get(y, 'null')}" for x, y in meanings.items())
    return (
        f', or train without it: "dataset.classes=[{", ".join(kept)}]" '
        f'"dataset.class_map={{{class_map}}}"'
    )


def _bar(items: Iterable, where: str, total: int) -> tqdm:
    return tqdm(items, f"checking {where}", total, leave=False, disable=no_bar(), unit="image")


def _complaint(unknown: Mapping[int, Path], kind: DatasetInfo) -> str:
    """Name the ids that mean nothing, a mask that shows one, and what would give them a meaning."""
    ids = sorted(unknown)
    coloured = len(kind.ids or b"") > 2 * IDS
    what = "colour" if coloured else "id"
    where = "dataset.class_map" if coloured else "dataset.class_map or dataset.ignore"
    named = ", ".join(map(kind.spell, ids[:20])) + (" ..." if len(ids) > 20 else "")
    known = f"from 0 to {len(kind.classes) - 1}" if kind.ids is None else "in dataset.class_map"
    return (
        f"{unknown[ids[0]]}: no meaning for {what} {named}; classes are {known}: add what is "
        f"missing to {where} ('other: null' ignores all {what}s without a name)"
    )


def find_root(section: DatasetSection) -> Path:
    """Return the folder that paths are relative to; a ``UserError`` if there is none."""
    root = Path(section.root)
    if root.is_dir():
        return root
    drawn = f" (python -m dataset.demo {root} draws it)" if section.kind == "demo" else ""
    raise UserError(
        f"dataset.root: {root} is not a folder; put the data there{drawn} or set dataset.root=PATH"
    )


def _find_list(section: DatasetSection, field: str, root: Path) -> Path:
    name = getattr(section, field)
    path = root / name  # or the name alone, if it is a whole path
    if not path.is_file():
        elsewhere = Path(name).absolute() if Path(name).is_file() else "PATH, a whole path"
        also = {
            "unlabeled": ", a folder or a glob; or train on labels alone by --method supervised",
            "labeled": "; from a labeling tool: python -m dataset.prepare labels --help",
        }
        raise UserError(
            f"dataset.{field}: {name} is not in {root}; set dataset.root=DIR or "
            f"dataset.{field}={elsewhere}{also.get(field, '')}"
        )
    return path
