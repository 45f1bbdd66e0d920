"""Labels that are mask pictures: of CVAT and Roboflow, and pairs of folders."""

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
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
Meaning = Mapping[int | str, str | None]  # class, or None for ignored, by id or colour in masks


def read_masks(source: Source) -> Found:
    """Read masks that are pictures: of ids or colours, beside their image or in another folder.

    A mask has the name of its image, or that name and ``_mask``, ``_labels`` or the like. What its
    ids mean tell ``--class-map``, a ``labelmap.txt`` (CVAT), a ``_classes.csv`` (Roboflow), or
    ``--classes``, in this order.

    Raises:
        UserError: nothing tells what ids mean, a malformed file that does, or no mask with an
            image.
    """
    meaning, folder = _meaning(source), source.labels
    images = {
        key: path
        for path in source.pictures
        for is_mask, key in [mask_place(path.relative_to(source.base))]
        if not is_mask
    }
    masks = _masks(folder, set(source.pictures_in(folder)) - set(images.values()))
    by_name = defaultdict(list)
    for key, path in masks.items():
        by_name[key[-1]].append(path)
    found, used = [], set()
    for key, image in images.items():
        fitting = [masks[key]] if key in masks else by_name[key[-1]]
        regions = partial(_regions, fitting[0], meaning) if len(fitting) == 1 else None
        used |= set(fitting) if regions else set()
        found.append(LabeledImage(image, source.split_of(image.parent), regions))
    if not used:
        raise UserError(
            f"{folder}: no mask has the name of an image in {source.base}; masks are in a folder "
            "such as 'masks', or end with '_mask'; --images DIR names the folder of the images"
        )
    if unused := sorted(str(path) for path in masks.values() if path not in used):
        source.notes["masks without an image of their name"] += unused
    names = [name for name in meaning.values() if name is not None]
    return Found(list(dict.fromkeys(names)), found, "later")


def _masks(folder: Path, candidates: Iterable[Path]) -> dict[tuple[str, ...], Path]:
    """Return the masks by what they share with their images; all candidates if none is marked."""
    places = {path: mask_place(path.relative_to(folder)) for path in sorted(candidates)}
    marked = {path: key for path, (is_mask, key) in places.items() if is_mask}
    masks: dict[tuple[str, ...], Path] = {}
    for path, key in (marked or {path: key for path, (_, key) in places.items()}).items():
        if _INSTANCES in path.parts:
            continue
        if key in masks:
            raise UserError(f"{path}: is a mask of the same image as {masks[key]}; remove one")
        masks[key] = path
    return masks


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
        "the order of the ids, or --class-map '{0: NAME, 255: NAME}'"
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
        raise LeftOut("masks of another size than their image")
    ignored = {} if colours else {IGNORE: None}
    for id_ in np.unique(ids).tolist():
        key = f"#{id_:06x}" if colours else id_
        name = {**ignored, **meaning}.get(key, meaning.get("other", f"{key}"))
        yield Region(name, ids == id_)
