"""labelme's JSON."""

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dataset.prepare.labels.drawing import refuse_size
from dataset.prepare.labels.records import (
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
from utils.errors import UserError
from utils.files import read_json


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
                notes[f"shapes of type {kind}"] += 1
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
