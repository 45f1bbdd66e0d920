"""Labels that are mask pictures: of CVAT and Roboflow, and pairs of folders."""

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from dataset.prepare.labels.records import (
    Found,
    LabeledImage,
    LeftOut,
    Notes,
    Region,
    Size,
    Source,
    class_name,
    mask_place,
    readable_labels,
)
from dataset.reading import read_ids
from utils import IGNORE
from utils.config.labelmap import read_labelmap
from utils.errors import UserError

_INSTANCES = "SegmentationObject"  # CVAT's masks of instances
_PHOTOS = (".jpg", ".jpeg")  # never masks; a PNG of their name beside them is
Key = tuple[str, ...]  # what the paths of an image and of its mask have in common
Meaning = Mapping[int | str, str | None]  # class, or None for ignored, by id or colour in masks


def read_masks(source: Source) -> Found:
    """Read masks that are pictures: of ids or colours, beside their image or in another folder.

    A mask has the name of its image, with or without an end such as ``_mask`` or ``_labels``. What
    its ids mean tell ``--class-map``, a ``labelmap.txt`` (CVAT), a ``_classes.csv`` (Roboflow), or
    ``--classes``, in this order.

    Raises:
        UserError: nothing tells what ids mean, a malformed file that does, or no mask with an
            image.
    """
    meaning, folder = _meaning(source), source.labels
    image_keys, mask_keys = _sort(source.pictures, source.base)
    if folder != source.base:
        others, mask_keys = _sort(source.pictures_in(folder), folder)
        mask_keys = mask_keys or others  # a folder of masks alone, whatever its name
    images, masks = _by_key(image_keys), _by_key(mask_keys)
    pairs = _pairs(images, masks)
    if not pairs:
        raise UserError(
            f"{folder}: no mask has the name of an image in {source.base}; masks are in a folder "
            "such as 'masks', or end with '_mask'; --images DIR names the folder of the images"
        )
    found = []
    for image in images.values():
        regions = partial(_regions, pairs[image], meaning) if image in pairs else None
        found.append(LabeledImage(image, source.split_of(image.parent), regions))
    if unused := sorted(map(str, set(masks.values()) - set(pairs.values()))):
        source.notes["masks without an image of their name"] += unused
    names = [name for name in meaning.values() if name is not None]
    return Found(list(dict.fromkeys(names)), found, "later")


def _sort(pictures: Sequence[Path], base: Path) -> tuple[dict[Path, Key], dict[Path, Key]]:
    """Tell images from masks; return the key of each."""
    photos = {path.with_suffix("") for path in pictures if path.suffix.lower() in _PHOTOS}
    images: dict[Path, Key] = {}
    masks: dict[Path, Key] = {}
    for path in pictures:
        is_mask, key = mask_place(path.relative_to(base))
        is_mask |= path.suffix.lower() == ".png" and path.with_suffix("") in photos
        if _INSTANCES not in path.parts:
            (masks if is_mask else images)[path] = key
    return images, masks


def _by_key(keys: Mapping[Path, Key]) -> dict[Key, Path]:
    found: dict[Key, Path] = {}
    for path, key in keys.items():
        if key in found:
            raise UserError(
                f"{path}: has the name of {found[key]} too, and which mask belongs to which image "
                "is not clear; rename or remove one, or name a folder that holds one of them"
            )
        found[key] = path
    return found


def _pairs(images: Mapping[Key, Path], masks: Mapping[Key, Path]) -> dict[Path, Path]:
    """Return the mask of each image: of the same key, else the only one whose key ends alike."""
    pairs = {image: masks[key] for key, image in images.items() if key in masks}
    others: dict[str, tuple[list[Key], list[Key]]] = defaultdict(lambda: ([], []))
    for number, keys in enumerate((images.keys() - masks.keys(), masks.keys() - images.keys())):
        for key in keys:
            others[key[-1]][number].append(key)
    for two in others.values():
        alike = [pair for pair in product(*two) if _end_alike(*pair)]
        if len(alike) == 1:
            pairs[images[alike[0][0]]] = masks[alike[0][1]]
    return pairs


def _end_alike(one: Key, other: Key) -> bool:
    count = min(len(one), len(other))
    return one[-count:] == other[-count:]


def _meaning(source: Source) -> Meaning:
    if source.class_map is not None:
        return source.class_map
    for pattern, read in (("labelmap.txt", read_labelmap), ("_classes.csv", _read_classes)):
        files = source.files(pattern) if source.labels.is_dir() else []
        found = [read(path) for path in files]
        if any(one != found[0] for one in found):
            raise UserError(f"{files[0]}: differs from {files[-1]}; prepare one of them at a time")
        if found:
            return {id_: class_name(name) for id_, name in found[0].items()}
    if source.classes is not None:
        return dict(enumerate(source.classes))
    raise UserError(
        f"{source.labels}: nothing tells what the ids of masks mean; add --classes NAME,NAME in "
        "the order of the ids, or --class-map '{0: NAME, 255: NAME}' (of colours: "
        "'{[255, 0, 0]: NAME}')"
    )


def _read_classes(path: Path) -> dict[int, str]:
    """Read Roboflow's ``Pixel Value, Class`` lines."""
    with readable_labels(path), path.open(encoding="utf-8-sig", newline="") as file:
        _, *rows = csv.reader(file, skipinitialspace=True)
        return {int(row[0]): row[1].strip() for row in rows if row}


def _regions(path: Path, meaning: Meaning, size: Size, _: Notes) -> Iterator[Region]:
    """Return the pixels of each id, or colour; one without a meaning is no class."""
    colours = any(isinstance(key, str) and key.startswith("#") for key in meaning)
    ids = read_ids(path, colours)
    if ids.shape != size:
        raise LeftOut("images of another size than their masks, left out")
    ignored = {} if colours else {IGNORE: None}
    for id_ in np.unique(ids).tolist():
        key = f"#{id_:06x}" if colours else id_
        name = {**ignored, **meaning}.get(key, meaning.get("other", f"{key}"))
        yield Region(name, ids == id_)
