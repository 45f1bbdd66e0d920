"""CVAT's XML, and its mask pictures as an export."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np

from dataset.prepare.labels.drawing import fill_polygons, ignored_box, refuse_size
from dataset.prepare.labels.export import label_of
from dataset.prepare.labels.records import (
    Found,
    LabeledImage,
    Notes,
    Region,
    Size,
    Source,
    class_name,
    readable_labels,
    with_background,
)
from dataset.prepare.work import require
from dataset.pseudo_labels import PseudoLabels
from dataset.reading import read_ids
from utils import IGNORE
from utils.errors import UserError
from utils.files import write_text
from utils.panels import in_colour, save


def read_cvat_xml(source: Source) -> Found:
    """Read 'CVAT for images 1.1': polygons and masks, drawn by their ``z_order``.

    An image without shapes counts as not labeled.

    Raises:
        UserError: no such XML file, a malformed one, or no pycocotools.
    """
    require("pycocotools")
    labels: list[str] = []
    images: list[LabeledImage] = []
    for path in source.files("*.xml"):
        try:
            root = ElementTree.parse(path).getroot()
        except ElementTree.ParseError as error:
            raise UserError(f"{path}: not XML ({error}); export it again") from error
        with readable_labels(path):
            labels += [name.text for name in root.iterfind(".//labels/label/name")]
            for each in root.iter("image"):
                if (picture := source.find(each.attrib["name"], path)) is None:
                    continue
                shapes = sorted(each, key=lambda shape: int(shape.get("z_order", 0)))
                shapes = [shape for shape in shapes if shape.tag != "tag"]
                size = int(each.attrib["height"]), int(each.attrib["width"])
                regions = partial(_cvat_regions, path, shapes, size) if shapes else None
                split = source.split_of(Path(each.get("subset", "")), picture.parent)
                images.append(LabeledImage(picture, split, regions))
    if not images:
        raise UserError(
            f"{source.labels}: no XML file with images; export the task as 'CVAT for images 1.1' "
            "or 'Segmentation mask 1.1'"
        )
    return Found(with_background(labels), source.with_rest(images), "later")


def _cvat_regions(
    path: Path,
    shapes: Sequence[ElementTree.Element],
    expected: Size,
    size: Size,
    notes: Notes,
) -> Iterator[Region]:
    refuse_size(expected, size)
    with readable_labels(path):
        for shape in shapes:
            name, values = class_name(shape.attrib["label"]), shape.attrib
            if shape.tag == "polygon":
                points = [float(x) for pair in values["points"].split(";") for x in pair.split(",")]
                yield Region(name, fill_polygons([points], size))
            elif shape.tag == "mask":  # run lengths of rows in a box, beginning with zeros
                left, top, width, height = (
                    int(values[x]) for x in ("left", "top", "width", "height")
                )
                runs = [int(run) for run in values["rle"].split(",")]
                part = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
                covered = np.zeros(size, bool)
                covered[top : top + height, left : left + width] = part
                yield Region(name, covered)
            elif shape.tag == "box":
                yield ignored_box(
                    [float(values[x]) for x in ("xtl", "ytl", "xbr", "ybr")], size, notes
                )
            else:
                notes[f"shapes of type {shape.tag}, left out"] += 1


def write_cvat(labels: PseudoLabels, out: Path) -> None:
    """Write 'Segmentation mask 1.1': coloured masks, ``labelmap.txt`` and a list."""
    palette, names = labels.kind.palette(), []
    for sample in labels.samples:
        path = out / "SegmentationClass" / PurePosixPath(sample.name).with_suffix(".png")
        save(in_colour(read_ids(sample.mask), palette).convert("RGB"), path)
        names.append(PurePosixPath(sample.name).with_suffix("").as_posix())
    lines = ["# label:color_rgb:parts:actions"]
    for id_ in (*range(len(labels.kind.classes)), IGNORE):
        colour = ",".join(map(str, palette[3 * id_ : 3 * id_ + 3]))
        lines.append(f"{label_of(labels, id_)}:{colour}::")
    write_text(out / "labelmap.txt", "".join(f"{line}\n" for line in lines))
    listed = "".join(f"{name}\n" for name in names)
    write_text(out / "ImageSets" / "Segmentation" / "default.txt", listed)
