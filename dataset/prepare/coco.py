"""COCO 2017: semantic masks of 80 classes and background, drawn from the instance annotations."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dataset.catalog import KINDS
from dataset.prepare.archives import Archive
from dataset.prepare.labels.drawing import draw
from dataset.prepare.labels.records import Notes, Region
from dataset.prepare.work import DataSet, Step, refuse_missing
from utils.errors import UserError
from utils.panels import save_mask

KIND = KINDS["coco"]
COUNTS = {"train": 118_287, "val": 5_000}
_ADDRESS = "http://images.cocodataset.org"
# COCO publishes no digests; these are the ones that TensorFlow Datasets checks its downloads by.
_ANNOTATIONS = "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268"
_TRAIN = "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"
_VAL = "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"
ARCHIVES = [
    Archive(f"{name}.zip", folder, folder, f"{_ADDRESS}/{place}/{name}.zip", digest, most=most)
    for place, name, folder, digest, most in (
        ("annotations", "annotations_trainval2017", "annotations", _ANNOTATIONS, 4),
        ("zips", "train2017", "train2017", _TRAIN, 40),
        ("zips", "val2017", "val2017", _VAL, 4),
    )
]


def _plan(root: Path) -> tuple[dict[str, list[str]], list[Step]]:
    """``masks/<id>.png`` for the images of both splits, ``train.txt`` and ``val.txt``."""
    from pycocotools.coco import COCO  # no other command needs it

    steps, lists = [], {}
    for split in COUNTS:
        path = root / f"annotations/instances_{split}2017.json"
        refuse_missing([path])
        with _annotations(path):
            found = COCO(path)
            categories = tuple(found.cats[each]["name"] for each in sorted(found.cats))
            names = {Path(x["file_name"]).stem: id_ for id_, x in sorted(found.imgs.items())}
        if categories != KIND.classes[1:]:
            raise UserError(f"{path}: its categories are not the 80 of COCO 2017; unpack it again")
        refuse_missing(root / f"{split}2017/{name}.jpg" for name in names)
        lists[split] = [f"{split}2017/{name}.jpg masks/{name}.png" for name in sorted(names)]
        sources = {root / f"masks/{name}.png": id_ for name, id_ in names.items()}
        steps.append(Step(f"masks of {split}", partial(_write_mask, path, found), sources))
    return lists, steps


def draw_mask(found: Any, image_id: int) -> np.ndarray:
    """Draw what pycocotools' ``COCO`` has of an image: (height, width) uint8.

    Class ids are 1 to 80 by ascending category id. A pixel has the class of the instances that
    cover it, 0 without any. It is ignored, 255, where instances of two classes overlap, as in
    torchvision's reference, and in crowds; the rule of published masks is not documented.
    """
    image = found.imgs[image_id]
    regions = (
        Region(
            None if entry["iscrowd"] else found.cats[entry["category_id"]]["name"],
            found.annToMask(entry).astype(bool),
        )
        for entry in found.imgToAnns.get(image_id, ())
    )
    size = image["height"], image["width"]
    return draw(regions, size, KIND.classes, "ignored", Notes())[0]


@contextmanager
def _annotations(path: Path, where: str = "") -> Iterator[None]:
    """Turn what pycocotools raises on malformed annotations into one line."""
    try:
        yield
    except Exception as error:  # pycocotools raises bare ones, too
        raise UserError(
            f"{path}: {where}malformed annotations ({error!r}); unpack the file again"
        ) from error


def _write_mask(annotations: Path, found: Any, image_id: int, path: Path) -> None:
    with _annotations(annotations, f"image {image_id}: "):
        ids = draw_mask(found, image_id)
    save_mask(path, ids, KIND.palette())


COCO_2017 = DataSet(
    "COCO 2017, semantic masks from instances (20 GB)", ARCHIVES, COUNTS, _plan, "pycocotools"
)
