"""Masks and lists of what a reader found; nothing that exists is overwritten."""

import filecmp
import hashlib
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from tqdm import tqdm

from dataset.catalog import DatasetInfo
from dataset.lists import Sample, line_of, write_lists
from dataset.prepare.labels.drawing import OVERLAPS, draw
from dataset.prepare.labels.records import (
    BACKGROUND,
    LISTS,
    MASKS,
    Found,
    LabeledImage,
    LeftOut,
    Notes,
    Source,
    absolute,
)
from dataset.reading import picture_size, read_ids
from utils import IGNORE
from utils.colours import voc_colours
from utils.errors import UserError
from utils.files import write_atomically
from utils.panels import save_mask
from utils.progress import no_bar


class Target(NamedTuple):
    """Where masks and lists go."""

    root: Path  # that lists are relative to
    tool: str  # names the folder of the masks
    lists: Path  # folder of the lists
    val: Fraction | None = None  # share of labeled images for validation, if the tool names none


def write_labels(
    source: Source, found: Found, target: Target, overlaps: str | None = None
) -> list[str]:
    """Draw the masks of labeled images and list all images.

    Pictures below the root stay where they are, others are copied to ``images`` in it. Masks are
    palette PNGs of class ids, as ``draw`` has them.

    Args:
        source: of the labels; its notes are told.
        found: what a reader made of it.
        target: where files go.
        overlaps: a key of OVERLAPS; None: the tool's own rule.

    Returns:
        What was done and what was left out, in lines; then the config's keys.

    Raises:
        UserError: no labeled image; fewer than two classes, or more than 255; a picture that
            cannot be read; a file that is there with other content; a root among the pictures.
    """
    root, base = target.root.resolve(), source.base.resolve()
    if root != base and root.is_relative_to(base):  # the copies there would be found, too
        raise UserError(
            f"--root: {target.root} lies in {source.base}, where the pictures are looked for; name "
            f"{source.base} itself, or a folder outside of it"
        )
    classes = found.classes if source.classes is None else list(source.classes)
    if not 2 <= len(classes) <= IGNORE:
        names = ", ".join(classes[:20])
        raise UserError(
            f"{source.labels}: has {len(classes)} classes ({names}), where two to 255 are wanted; "
            "name them with --classes, the background among them"
        )
    if all(image.regions is None for image in found.images):
        raise UserError(f"{source.labels}: no image is labeled; is --from the right tool?")
    images = _places(source, found.images, target.root)
    rule = overlaps or found.overlaps
    write = partial(_write, target=target, classes=classes, overlaps=rule)
    with ThreadPoolExecutor() as pool:
        jobs = pool.map(write, *zip(*images.items(), strict=True))
        written = list(tqdm(jobs, "masks", len(images), leave=False, disable=no_bar()))
    lists: dict[str, list[Sample]] = {name: [] for name in ("labeled", "unlabeled", "val", "test")}
    for image, one in zip(images.values(), written, strict=True):
        if one.sample is not None:
            lists[one.where].append(one.sample)
        for what, count in one.notes.items():
            source.notes[what] += [str(image.path)] * count
    if target.val is not None and not lists["val"]:
        lists["val"], lists["labeled"] = _drawn(lists["labeled"], target.val)
    lines = {key: [line_of(x, target.root) for x in rows] for key, rows in lists.items() if rows}
    write_lists(target.lists, lines)
    contested = [one.contested for one in written if one.contested]
    return [*_report(target, lines, source.notes, contested, rule), _keys(target, lines, classes)]


class _Written(NamedTuple):
    where: str  # name of a list
    sample: Sample | None  # None: the image is left out
    notes: Notes
    contested: int = 0  # pixels in regions of two classes


def _write(
    name: str, image: LabeledImage, target: Target, classes: Sequence[str], overlaps: str
) -> _Written:
    """Write the mask of an image, if it is labeled, and the image, if it lies elsewhere."""
    notes, sample, contested = Notes(), Sample(name, target.root / name, None), 0
    where = "unlabeled" if image.regions is None else LISTS[image.split]
    if image.regions is None and image.split != "train":
        return _Written(where, None, Notes([f"images of {image.split} without labels, left out"]))
    if image.regions is not None:
        size = picture_size(image.path)
        mask = target.root / f"{MASKS}{target.tool}" / Path(name).with_suffix(".png")
        try:
            regions = image.regions(size, notes)
            ids, contested = draw(regions, size, classes, overlaps, notes)
        except LeftOut as why:
            return _Written(where, None, Notes([str(why)]))
        if BACKGROUND in classes and (ids == classes.index(BACKGROUND)).all():
            notes["labeled images of background alone"] += 1
        _save(mask, ids, DatasetInfo(tuple(classes), voc_colours(len(classes))).palette())
        sample = sample._replace(mask=mask)
    _copy(image.path, sample.image)
    return _Written(where, sample, notes, contested)


def _places(source: Source, images: Sequence[LabeledImage], root: Path) -> dict[str, LabeledImage]:
    """Return the images by their path relative to the root, sorted.

    Raises:
        UserError: two of them would share a mask.
    """
    root, base, places = absolute(root), absolute(source.base), {}
    for image in images:
        path = absolute(image.path)
        if path.is_relative_to(root):
            name = path.relative_to(root)
        else:
            name = "images" / (
                path.relative_to(base) if path.is_relative_to(base) else Path(path.name)
            )
        key = name.with_suffix("")
        if key in places:
            raise UserError(
                f"{image.path}: {places[key][1].path} would have the same mask; rename one"
            )
        places[key] = name.as_posix(), image
    return dict(sorted(places.values(), key=lambda pair: pair[0]))


def _copy(picture: Path, path: Path) -> None:
    if path.exists():
        if not filecmp.cmp(picture, path, shallow=False):
            raise UserError(
                f"{path}: is there, and {picture} is another picture; name a new --root"
            )
        return
    write_atomically(path, lambda partial: shutil.copyfile(picture, partial))


def _save(path: Path, ids: np.ndarray, palette: bytes) -> None:
    if not path.exists():
        save_mask(path, ids, palette)
    elif not np.array_equal(read_ids(path), ids):
        raise UserError(f"{path}: is there with other labels; move it away, or name a new --root")


def _drawn(labeled: Sequence[Sample], share: Fraction) -> tuple[list[Sample], list[Sample]]:
    """Draw a share of images, at random but always the same; return them and the others."""
    order = sorted(labeled, key=lambda sample: hashlib.sha256(sample.name.encode()).digest())
    count = math.ceil(len(order) * share)
    return sorted(order[:count]), sorted(order[count:])


def _report(
    target: Target,
    lines: Mapping[str, Sequence[str]],
    notes: Mapping[str, Sequence[str]],
    contested: Sequence[int],
    overlaps: str,
) -> Iterator[str]:
    for name, rows in lines.items():
        yield f"{target.lists / name}.txt: {len(rows)} images"
    if "val" not in lines:
        yield "no image is for validation: --val 1/5 takes a fifth of the labeled ones"
    if notes:
        yield "left out, or worth a look:"
    for what, places in sorted(notes.items()):
        yield f"  {len(places)} {what}, such as in {places[0]}"
    if contested:
        yield (
            f"{sum(contested)} pixels of {len(contested)} images lie in regions of two classes: "
            f"{OVERLAPS[overlaps]}; --overlaps {{{','.join(OVERLAPS)}}} chooses"
        )


def _keys(target: Target, lists: Iterable[str], classes: Sequence[str]) -> str:
    keys = {"kind": "custom", "root": str(target.root), "classes": list(classes)}
    for name in lists:  # those that a config does not name by itself
        if name == "test" or absolute(target.lists) != absolute(target.root):
            keys[name] = str(absolute(target.lists) / f"{name}.txt")
    text = yaml.safe_dump({"dataset": keys}, default_flow_style=None, sort_keys=False, width=100)
    return f"keys of a config that reads it:\n{text.rstrip()}"
