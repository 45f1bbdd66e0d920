"""Regions of labels, drawn as class ids."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dataset.prepare.labels.records import BACKGROUND, LeftOut, Notes, Region, Size
from utils import IGNORE

OVERLAPS = {  # what counts where regions of two classes overlap
    "ignored": "they are ignored",
    "later": "the later region counts",
    "smaller": "the smaller region counts",
}
_LIMIT = 1e6  # pixels; what draws polygons takes memory by their length


def draw(
    regions: Iterable[Region], size: Size, classes: Sequence[str], overlaps: str, notes: Notes
) -> tuple[np.ndarray, int]:
    """Draw regions as class ids.

    Args:
        regions: in the order in which they are drawn.
        size: (height, width).
        classes: names by class id. A region of another class is ignored, with a note.
        overlaps: a key of OVERLAPS.
        notes: of what is left out.

    Returns:
        (H, W) uint8, and the number of pixels in regions of two classes. A pixel in no region is
        background, or 255 if there is no such class.
    """
    rest = classes.index(BACKGROUND) if BACKGROUND in classes else IGNORE
    ids, drawn, contested = np.full(size, rest, np.uint8), *np.zeros((2, *size), bool)
    if overlaps == "smaller":
        regions = sorted(regions, key=lambda region: -np.count_nonzero(region.covered))
    for name, covered in regions:
        if name is not None and name not in classes:
            notes[f"regions of '{name}', which is no class: their pixels are ignored"] += 1
        label = classes.index(name) if name in classes else IGNORE
        claimed = covered & drawn & (ids != label)
        ids[covered] = label
        ids[claimed & (overlaps == "ignored")] = IGNORE
        drawn |= covered
        contested |= claimed
        if not covered.any():
            notes["regions without a pixel"] += 1
    return ids, int(np.count_nonzero(contested))


def fill_polygons(rings: Sequence[Sequence[float]], size: Size) -> np.ndarray:
    """Fill polygons as pycocotools does: (H, W) bool, true in any of them.

    Args:
        rings: x and y in turn, of pixels that begin at whole numbers; fewer than three points
            cover nothing.
        size: (height, width).

    Raises:
        ValueError: an odd number of coordinates, or one that is far outside the picture.
    """
    from pycocotools import mask  # readers of other tools do without

    whole = [np.asarray(ring, float) for ring in rings if len(ring) > 5]
    if any(len(ring) % 2 or not (np.abs(ring) < _LIMIT).all() for ring in whole):
        raise ValueError("coordinates of a polygon")
    if not whole:
        return np.zeros(size, bool)
    parts = mask.frPyObjects([ring.tolist() for ring in whole], *size)
    return mask.decode(mask.merge(parts)).astype(bool)


def fill_runs(runs: Mapping[str, Any]) -> np.ndarray:
    """Decode COCO's run lengths, compressed or not: (H, W) bool; a ValueError if they don't fit."""
    from pycocotools import mask

    size, counts = runs["size"], runs["counts"]
    if isinstance(counts, list):
        if sum(counts) != math.prod(size):
            raise ValueError("run lengths that do not add up to the picture")
        runs = mask.frPyObjects(dict(runs), *size)
    return mask.decode(runs).astype(bool)


def ignored_box(corners: Sequence[float], size: Size, notes: Notes) -> Region:
    """Return a box, left, top, right, bottom, as ignored: its object is somewhere in it."""
    notes["boxes, whose pixels are ignored"] += 1
    covered = np.zeros(size, bool)
    left, top, right, bottom = (max(0, round(corner)) for corner in corners)
    covered[top:bottom, left:right] = True
    return Region(None, covered)


def refuse_size(expected: Size, size: Size) -> None:
    """Raise ``LeftOut`` where labels are of a picture of another size."""
    if expected != size:
        raise LeftOut("images of another size than their labels, left out")
