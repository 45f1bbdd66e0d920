"""Labeling tools by name: who reads and who writes their files, and the two commands for them."""

import argparse
import os.path
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from dataset.prepare.labels.coco import read_coco, write_coco
from dataset.prepare.labels.cvat import read_cvat_xml, write_cvat
from dataset.prepare.labels.drawing import OVERLAPS
from dataset.prepare.labels.export import (
    Writer,
    choose,
    export_labels,
    refuse_other_threshold,
)
from dataset.prepare.labels.labelme import read_labelme, write_labelme
from dataset.prepare.labels.pictures import read_masks
from dataset.prepare.labels.records import Found, Source, read_names
from dataset.prepare.labels.writing import Target, write_labels
from dataset.prepare.labels.yolo import read_yolo
from dataset.pseudo_labels import read_pseudo_labels
from utils.config.schema import ClassMap
from utils.errors import UserError
from utils.outputs import Output, refuse_outputs


def read_cvat(source: Source) -> Found:
    """Read 'Segmentation mask 1.1' where there is a label map, else 'CVAT for images 1.1'."""
    return read_masks(source) if source.files("labelmap.txt") else read_cvat_xml(source)


def read_roboflow(source: Source) -> Found:
    """Read Roboflow's export of semantic masks, COCO or YOLO, whichever it is."""
    if source.files("_classes.csv"):
        return read_masks(source)
    return read_coco(source) if source.files("*.coco.json") else read_yolo(source)


READERS: dict[str, Callable[[Source], Found]] = {
    "coco": read_coco,
    "labelme": read_labelme,
    "yolo": read_yolo,
    "cvat": read_cvat,
    "roboflow": read_roboflow,
    "folders": read_masks,
}
WRITERS: dict[str, Writer] = {"coco": write_coco, "labelme": write_labelme, "cvat": write_cvat}


def add_commands(commands: Any) -> None:
    """Add ``labels`` and ``export-labels`` to the commands."""
    about = "masks and lists from the labels of a tool"
    one = commands.add_parser("labels", help=about, description=about)
    one.set_defaults(run=labels)
    add = one.add_argument
    add("source", type=Path, metavar="SOURCE", help="folder, or file, that the tool exported")
    add("--from", dest="tool", required=True, choices=READERS, help="whose labels they are")
    add("--root", type=Path, required=True, metavar="DIR", help="folder for masks and lists")
    add("--images", type=Path, metavar="DIR", help="where the pictures are (SOURCE)")
    add(
        "--classes", metavar="NAMES", help="in the order of their ids, by commas, or a file's lines"
    )
    add("--class-map", metavar="YAML", help="class of each id or colour: '{0: road, 255: null}'")
    add("--lists", type=Path, metavar="DIR", help="folder for the lists, instead of --root")
    add("--val", metavar="SHARE", help="share of the labeled images that validates, such as 1/5")
    add(
        "--overlaps",
        choices=OVERLAPS,
        help="what counts in regions of two classes (the tool's rule)",
    )
    about = "pseudo labels of a run, for correction in a tool"
    one = commands.add_parser("export-labels", help=about, description=about)
    one.set_defaults(run=export)
    add = one.add_argument
    add("folder", type=Path, metavar="RUN", help="outdir/<name>")
    add("--to", dest="tool", required=True, choices=WRITERS, help="the tool")
    add("--images", type=Path, metavar="LIST", help="images to export (all)")
    add("--threshold", type=float, help="that of the run's pseudo labels (pseudo_label.threshold)")
    add("--out", type=Path, metavar="DIR", help="folder for the files (RUN/labels_<tool>)")


def labels(typed: argparse.Namespace) -> None:
    """Write masks and lists; print what was done and what was left out."""
    source = Source(
        typed.source, typed.images, _classes(typed.classes), _class_map(typed.class_map)
    )
    val = None if typed.val is None else _share(typed.val)
    target = Target(typed.root, typed.tool, typed.lists or typed.root, val)
    found = READERS[typed.tool](source)
    print(*write_labels(source, found, target, typed.overlaps), sep="\n")


def export(typed: argparse.Namespace) -> None:
    """Write the pseudo labels of a run for a tool; print what to do after correction."""
    out = typed.folder / f"labels_{typed.tool}" if typed.out is None else typed.out
    refuse_outputs([Output("--out", out)], {})
    found = read_pseudo_labels(typed.folder)
    if typed.threshold is not None:
        refuse_other_threshold(found, typed.threshold, typed.folder)
    found = found if typed.images is None else choose(found, typed.images)
    print(*export_labels(found, typed.tool, WRITERS[typed.tool], out), sep="\n")


def _classes(text: str | None) -> list[str] | None:
    if text is None:
        return None
    is_file = os.path.isfile(text)  # noqa: PTH113 - False also for names longer than a path
    names = read_names(Path(text)) if is_file else [x.strip() for x in text.split(",")]
    if len(set(names)) < len(names):
        raise UserError(f"--classes: two classes have one name in {', '.join(names)}")
    if "" in names:
        raise UserError(f"--classes: a class without a name in {text!r}; leave that comma out")
    return names


def _class_map(text: str | None) -> dict[int | str, str | None] | None:
    if text is None:
        return None
    try:
        found = TypeAdapter(ClassMap).validate_python(yaml.safe_load(text))
    except yaml.YAMLError:
        raise UserError(
            f"--class-map: {text!r} is not YAML; write '{{0: road, 255: null}}'"
        ) from None
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"--class-map: {text!r} is not allowed: {message}") from None
    return {key: None if name is None else str(name) for key, name in found.items()}


def _share(text: str) -> Fraction:
    try:  # without exponents: Fraction writes 1e-999999999 out
        share = Fraction(text if re.fullmatch(r"[\d./]{1,20}", text, re.ASCII) else 0)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share < 1:
        raise UserError(f"--val: '{text}' is no share between 0 and 1; write 1/5 or 0.2")
    return share
