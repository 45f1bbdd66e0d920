"""YOLO's segmentation text."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import yaml

from dataset.prepare.labels.drawing import fill_polygons, ignored_box
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
from dataset.prepare.work import require
from utils.errors import UserError


def read_yolo(source: Source) -> Found:
    """Read YOLO's segmentation text: a class and the points of a polygon a line, as shares.

    Class names come from ``names`` of a YAML file, ``classes.txt`` or ``obj.names``. An empty file
    is an image of background alone; an image without a file is not labeled.

    Raises:
        UserError: no text file of labels, a malformed one, no class names, or no pycocotools.
    """
    require("pycocotools")
    names, images = _yolo_names(source), []
    for picture in source.pictures:
        parts = picture.relative_to(source.base).parts
        files = [source.labels.joinpath(*parts).with_suffix(".txt")]
        if "images" in parts:
            place = len(parts) - 1 - parts[::-1].index("images")
            parts = (*parts[:place], "labels", *parts[place + 1 :])
            files.insert(0, source.labels.joinpath(*parts).with_suffix(".txt"))
        regions = [partial(_yolo_regions, file, names) for file in files if file.is_file()]
        split = source.split_of(picture.parent)
        images.append(LabeledImage(picture, split, regions[0] if regions else None))
    if all(image.regions is None for image in images):
        raise UserError(
            f"{source.labels}: no picture has a text file beside it, or in 'labels' where the "
            "picture is in 'images'"
        )
    return Found(with_background(names.values()), images, "smaller")


def _yolo_names(source: Source) -> dict[int, str]:
    """Return class names by YOLO's number."""
    for path in [*source.files("*.yaml"), *source.files("*.yml")]:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not YAML ({error}); correct or remove it") from error
        names = content.get("names") if isinstance(content, dict) else None
        if names:
            pairs = sorted(names.items()) if isinstance(names, dict) else enumerate(names)
            return {number: str(name) for number, name in pairs}
    for path in [*source.files("classes.txt"), *source.files("obj.names")]:
        return dict(enumerate(read_names(path)))
    raise UserError(
        f"{source.labels}: names no class; write them into a classes.txt there, one a line, in the "
        "order of YOLO's numbers"
    )


def _yolo_regions(
    path: Path, names: Mapping[int, str], size: Size, notes: Notes
) -> Iterator[Region]:
    scale = size[1], size[0]
    with readable_labels(path):
        for line in filter(str.strip, path.read_text(encoding="utf-8").splitlines()):
            label, *words = line.split()
            numbers = np.array(words, float)
            if not ((numbers > -0.1) & (numbers < 1.1)).all():
                raise ValueError(f"{line[:60]!r}: coordinates are shares, from 0 to 1")
            name = names.get(int(label), f"class {label}")
            if len(numbers) == 4:  # centre and sides
                centre, half = numbers[:2] * scale, numbers[2:] * scale / 2
                yield ignored_box((*(centre - half), *(centre + half)), size, notes)
            else:
                points = numbers * np.resize(scale, len(numbers))
                yield Region(class_name(name), fill_polygons([points], size))
