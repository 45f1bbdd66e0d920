"""labelme's JSON."""

import base64
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from dataset.prepare.labels.drawing import refuse_size
from dataset.prepare.labels.export import label_of, regions_of, rest_of
from dataset.prepare.labels.records import (
    OPEN,
    Found,
    LabeledImage,
    Notes,
    Region,
    Size,
    Source,
    class_name,
    read_names,
    readable_labels,
    with_background,
)
from dataset.pseudo_labels import PseudoLabels
from dataset.reading import read_ids
from utils.errors import UserError
from utils.files import read_json, write_json, write_text
from utils.progress import no_bar


def read_labelme(source: Source) -> Found:
    """Read labelme's JSON, as labelme draws it: later shapes over earlier ones.

    ``labels.txt`` gives the order of the classes, else the alphabet does.

    Raises:
        UserError: no labelme file, or a malformed one.
    """
    names: set[str] = set()
    images: list[LabeledImage] = []
    for path in source.files("*.json"):
        content = read_json(path)
        if not isinstance(content, dict) or "shapes" not in content:
            continue
        with readable_labels(path):
            shapes = content["shapes"]
            names |= {x["label"] for x in shapes if x.get("shape_type") not in _WITHOUT_AREA}
            picture = source.find(content.get("imagePath") or path.name, path)
            if picture is not None:
                regions = partial(_labelme_regions, path, content)
                images.append(LabeledImage(picture, source.split_of(picture.parent), regions))
    if not images:
        raise UserError(
            f"{source.labels}: no JSON file of labelme whose picture is here; --images DIR names "
            "the folder of the pictures"
        )
    order = [name for path in source.files("labels.txt")[:1] for name in read_names(path)]
    return Found(with_background([*order, *sorted(names)]), source.with_rest(images), "later")


_WITHOUT_AREA = ("point", "points", "line", "linestrip")


def _labelme_regions(
    path: Path, content: Mapping[str, Any], size: Size, notes: Notes
) -> Iterator[Region]:
    refuse_size((content.get("imageHeight") or size[0], content.get("imageWidth") or size[1]), size)
    with readable_labels(path):
        for shape in content["shapes"]:
            kind = shape.get("shape_type") or "polygon"
            if kind in _WITHOUT_AREA:
                notes[f"shapes of type {kind}, left out"] += 1
                continue
            points = [tuple(map(float, point)) for point in shape["points"]]
            covered = _labelme_shape(kind, points, shape.get("mask"), size)
            yield Region(class_name(shape["label"]), covered)


def _labelme_shape(
    kind: str, points: Sequence[tuple[float, float]], mask: str | None, size: Size
) -> np.ndarray:
    """Draw a shape as labelme 6.3 does: pixels have their centres at whole numbers."""
    picture = Image.new("1", size[::-1])
    pen, (first, last) = ImageDraw.Draw(picture), (points[0], points[-1])
    if kind == "mask":
        with Image.open(io.BytesIO(base64.b64decode(mask, validate=True))) as part:
            picture.paste(part.convert("1"), tuple(map(int, first)))
    elif kind == "circle":
        radius = math.dist(first, last)
        pen.ellipse([x + sign * radius for sign in (-1, 1) for x in first], 1, 1)
    elif kind == "rectangle":
        pairs = list(zip(first, last, strict=True))
        pen.rectangle([*map(min, pairs), *map(max, pairs)], 1, 1)
    elif kind not in ("polygon", "oriented_rectangle"):
        raise ValueError(f"shape_type {kind!r}")
    elif len(points) > 2:
        pen.polygon(points, 1, 1)
    return np.asarray(picture)


def write_labelme(labels: PseudoLabels, out: Path) -> None:
    """Write a JSON file of polygons an image, and ``labels.txt``.

    A polygon covers its holes, and what is in them comes later. Background is drawn in holes alone.
    """
    names, rest = [OPEN, *labels.kind.classes], rest_of(labels)
    for sample in tqdm(labels.samples, "regions", disable=no_bar()):
        path = out / PurePosixPath(sample.name).with_suffix(".json")
        ids, shapes = read_ids(sample.mask), []
        for id_, box, part in regions_of(ids):
            inside = all(x.start and x.stop < side for x, side in zip(box, ids.shape, strict=True))
            if id_ != rest or inside:
                points = outline(part) + np.array([box[1].start, box[0].start])
                shape = {"label": label_of(labels, id_), "points": points.tolist()}
                shapes.append({**shape, "group_id": None, "shape_type": "polygon", "flags": {}})
        content = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": Path(os.path.relpath(sample.image, path.parent)).as_posix(),
            "imageData": None,
            "imageHeight": ids.shape[0],
            "imageWidth": ids.shape[1],
        }
        write_json(path, content)
    write_text(out / "labels.txt", "".join(f"{name}\n" for name in names))


def outline(region: np.ndarray) -> np.ndarray:
    """Return the outer border pixels of a connected region in their order, without holes.

    Args:
        region: (H, W) bool.

    Returns:
        (N, 2) int, x and y of the corners, three at least; labelme draws the region from them.
    """
    from skimage import measure

    padded = np.pad(region, 1)
    borders = measure.find_contours(padded.astype(float), 0.5, fully_connected="high")
    border = max(borders, key=lambda points: np.ptp(points, axis=0).sum())
    # Points lie halfway between a pixel of the region and one outside.
    low, high = np.floor(border).astype(int), np.ceil(border).astype(int)
    pixels = np.where(padded[tuple(low.T)][:, None], low, high)[:-1] - 1
    pixels = pixels[(pixels != np.roll(pixels, 1, axis=0)).any(axis=1)]
    if len(pixels) > 2:  # corners alone
        before, after = pixels - np.roll(pixels, 1, axis=0), np.roll(pixels, -1, axis=0) - pixels
        pixels = pixels[(before != after).any(axis=1)]
    pixels = pixels if len(pixels) else np.argwhere(region)[:1]
    return np.resize(pixels, (max(3, len(pixels)), 2))[:, ::-1]
