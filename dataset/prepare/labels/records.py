"""What readers of labels return, and where they look."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.lists import pictures_among
from utils.errors import UserError
from utils.files import read_text

BACKGROUND, OPEN = "background", "__ignore__"  # class of the rest; label of pixels to ignore
MASKS = "masks_from_"  # begins the name of a folder of masks that ``write_labels`` wrote
LISTS = {"train": "labeled", "val": "val", "test": "test"}  # by split
_SPLITS = {"valid": "val", "validation": "val", "testing": "test"}
# Words in names of folders, and at the end of names of files.
_MASK = re.compile(r"(mask|label|annotation|annot|seg\w*|gt|groundtruth)s?", re.IGNORECASE)
_IMAGE = re.compile(r"(\w*image|img|photo|picture|input)s?", re.IGNORECASE)
Size = tuple[int, int]  # (height, width)
Notes = Counter[str]  # what is left out of an image, and how often


class Region(NamedTuple):
    """Pixels that have one label."""

    name: str | None  # of the class; None: ignored
    covered: np.ndarray  # (H, W) bool


class LabeledImage(NamedTuple):
    """A picture, and what a tool has of it."""

    path: Path
    split: str  # a key of LISTS
    # Returns the regions of the picture, of this size, in the tool's order, and takes notes of what
    # it leaves out; raises ``LeftOut``. None: the picture is not labeled.
    regions: Callable[[Size, Notes], Iterable[Region]] | None = None


class Found(NamedTuple):
    """What a reader found."""

    classes: list[str]  # in the tool's order
    images: list[LabeledImage]
    overlaps: str  # the tool's own rule, a key of OVERLAPS


class LeftOut(Exception):
    """Why the labels of an image cannot be used."""


class Source:
    """What a reader reads: labels of a tool, and the pictures that they may belong to.

    Args:
        labels: folder, or file, of the labels.
        pictures: folder of the pictures; None: the folder of the labels.
        classes: names by class id; None: the tool's.
        class_map: class name, or None for ignored, by id or colour in mask files; None: the tool's.

    Raises:
        UserError: no such folder or file, or no picture.
    """

    def __init__(
        self,
        labels: Path,
        pictures: Path | None = None,
        classes: Sequence[str] | None = None,
        class_map: Mapping[int | str, str | None] | None = None,
    ) -> None:
        self.labels, self.classes, self.class_map = labels, classes, class_map
        self.notes: dict[str, list[str]] = defaultdict(list)  # what is left out, and where
        self.base = pictures or (labels.parent if labels.is_file() else labels)
        if not labels.exists():
            raise UserError(f"{labels}: no such file or folder; name what the tool exported")
        if labels.suffix.lower() in (".zip", ".tar", ".gz", ".7z"):
            raise UserError(f"{labels}: is an archive; unpack it and name the folder")
        self.pictures = self.pictures_in(self.base)
        if not self.pictures:
            raise UserError(f"{self.base}: no picture is here; name their folder with --images DIR")
        self._by_name, self._by_stem = defaultdict(list), defaultdict(list)
        for path in self.pictures:
            self._by_name[path.name].append(path)
            self._by_stem[path.with_suffix("")].append(path)

    def files(self, pattern: str) -> list[Path]:
        """List the files of labels with such names, in the folder and below it."""
        if self.labels.is_file():
            return [self.labels] if self.labels.match(pattern) else []
        return sorted(path for path in self.labels.rglob(pattern) if path.is_file())

    def pictures_in(self, folder: Path) -> list[Path]:
        """List the pictures below a folder, but no masks that ``write_labels`` wrote."""
        found = pictures_among(folder.rglob("*"), folder)
        return [x for x in found if not x.relative_to(folder).parts[0].startswith(MASKS)]

    def find(self, name: str, beside: Path | None = None) -> Path | None:
        """Find a picture by the path that a tool has of it; take a note if there is none.

        Args:
            name: a path; its last parts, as many as tell it from other pictures, must be right.
            beside: file of labels that the path may be relative to, or that lies beside a picture
                of its name.
        """
        parts = tuple(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))
        if beside is not None and (exact := beside.parent.joinpath(*parts)).is_file():
            return absolute(exact)
        for length in range(len(parts), 0, -1):
            fitting = [x for x in self._by_name[parts[-1]] if x.parts[-length:] == parts[-length:]]
            if len(fitting) == 1:
                return fitting[0]
        if beside is not None and len(fitting := self._by_stem[beside.with_suffix("")]) == 1:
            return fitting[0]
        self.notes["labels without a picture, or with two of its name"].append(name)
        return None

    def split_of(self, *places: Path) -> str:
        """Tell the split by words in paths, the first of which that has one counts: or 'train'."""
        for path in places:
            inside = [base for base in (self.base, self.labels) if path.is_relative_to(base)]
            path = path.relative_to(inside[0]) if inside else path
            for word in reversed(re.findall("[a-z]+", path.as_posix().lower())):
                if (split := _SPLITS.get(word, word)) in LISTS:
                    return split
        return "train"

    def with_rest(self, images: Sequence[LabeledImage]) -> list[LabeledImage]:
        """Return images, each once, and other pictures, if no masks, as images without labels.

        Raises:
            UserError: a picture is labeled twice.
        """
        by_path: dict[Path, LabeledImage] = {}
        for image in images:
            if absolute(image.path) in by_path:
                raise UserError(
                    f"{image.path}: is labeled twice in {self.labels}; name one file, or one folder"
                )
            by_path[absolute(image.path)] = image
        for path in self.pictures:
            if absolute(path) in by_path:
                continue
            if mask_place(path.relative_to(self.base))[0]:
                self.notes["pictures with the name or folder of a mask, left out"].append(str(path))
                continue
            by_path[absolute(path)] = LabeledImage(path, self.split_of(path.parent))
        return list(by_path.values())


def absolute(path: Path) -> Path:
    """Spell a path in one way; links in it stay links."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow them


def mask_place(path: Path) -> tuple[bool, tuple[str, ...]]:
    """Tell whether a picture is a mask, by its path, and what it has in common with its partner.

    The end of its name counts, such as ``_mask``, else the last folder called after masks or
    images.
    """
    parts, is_mask = [], False
    for part in path.parts[:-1]:
        words = re.split("[_-]", part)
        kinds = [bool(_MASK.fullmatch(x)) - bool(_IMAGE.fullmatch(x)) for x in words]
        is_mask = max(kinds) > 0 or (is_mask and min(kinds) == 0)
        rest = [word for word, kind in zip(words, kinds, strict=True) if kind == 0]
        parts += ["_".join(rest)] if rest else []
    name, mark, end = re.fullmatch("(.*?)(?:([_-])([^_-]*))?", path.stem).groups()
    if mark and _MASK.fullmatch(end):
        return True, (*parts, name)
    return is_mask, (*parts, path.stem)


@contextmanager
def readable_labels(path: Path) -> Iterator[None]:
    """Turn what malformed labels raise into one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: malformed labels ({error!r}); export them again") from error


def read_names(path: Path) -> list[str]:
    """Read names, one a line."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def class_name(label: str) -> str | None:
    """Return the class of a tool's label; None if pixels of it are ignored."""
    return {OPEN: None, "_background_": BACKGROUND}.get(label, label)


def with_background(labels: Iterable[str]) -> list[str]:
    """Return the classes of labels, in their order, with the background first."""
    names = map(class_name, labels)
    return list(dict.fromkeys([BACKGROUND, *(name for name in names if name is not None)]))
