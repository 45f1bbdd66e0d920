"""COCO 2017: semantic masks of 80 classes and background, drawn from the instance annotations."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from dataset.catalog import KINDS
from dataset.prepare.archives import Archive, provide
from dataset.prepare.work import Step, complete, import_extra, refuse_missing
from utils import IGNORE
from utils.errors import UserError
from utils.files import read_json
from utils.panels import save_mask

COUNTS = {"train": 118_287, "val": 5_000}
_ADDRESS = "http://images.cocodataset.org"
# COCO publishes no digests; these are the ones that TensorFlow Datasets checks its downloads by.
_ANNOTATIONS = "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268"
_TRAIN = "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929"
_VAL = "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05"
ARCHIVES = tuple(
    Archive(f"{name}.zip", folder, folder, f"{_ADDRESS}/{place}/{name}.zip", digest)
    for place, name, folder, digest in (
        ("annotations", "annotations_trainval2017", "annotations", _ANNOTATIONS),
        ("zips", "train2017", "train2017", _TRAIN),
        ("zips", "val2017", "val2017", _VAL),
    )
)


class Region(NamedTuple):
    """An annotated instance or crowd."""

    segmentation: list | dict  # polygons, or a run-length code, as COCO's JSON has them
    label: int  # class id; 255 for a crowd


class Scene(NamedTuple):
    """An image's size in pixels, and what is annotated in it."""

    height: int
    width: int
    regions: list[Region]


def prepare_coco(
    root: Path, download: bool, workers: int, counts: Mapping[str, int] = COUNTS
) -> None:
    """Write ``masks/<id>.png`` for the images of both splits, ``train.txt`` and ``val.txt``.

    The archives have 20 GB.
    """
    _coco_masks()
    provide(root, ARCHIVES, download)
    scenes, lists = {}, {}
    for split in counts:
        found = read_scenes(root / f"annotations/instances_{split}2017.json")
        names = sorted(found)
        refuse_missing(root / f"{split}2017/{name}.jpg" for name in names)
        lists[split] = [f"{split}2017/{name}.jpg masks/{name}.png" for name in names]
        scenes |= {root / f"masks/{name}.png": found[name] for name in names}
    complete(root, lists, counts, [Step("masks", write_coco_mask, scenes)], workers)


def read_scenes(path: Path) -> dict[str, Scene]:
    """Read instance annotations, by the name of their image without its suffix.

    Class ids are 1 to 80 by ascending category id. Images without annotations have no regions.
    """
    try:
        found = read_json(path)
        categories = sorted(found["categories"], key=lambda category: category["id"])
        labels = {category["id"]: label for label, category in enumerate(categories, start=1)}
        scenes = {
            image["id"]: (Path(image["file_name"]).stem, Scene(image["height"], image["width"], []))
            for image in found["images"]
        }
        for entry in found["annotations"]:
            label = IGNORE if entry["iscrowd"] else labels[entry["category_id"]]
            scenes[entry["image_id"]][1].regions.append(Region(entry["segmentation"], label))
        names = tuple(category["name"] for category in categories)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot read instance annotations in it ({error!r}); unpack it again"
        ) from error
    if names != KINDS["coco"].classes[1:]:
        raise UserError(f"{path}: its categories are not the 80 of COCO 2017; unpack it again")
    return dict(scenes.values())


def draw_mask(scene: Scene) -> np.ndarray:
    """Draw the regions of an image, in any order: (height, width) uint8.

    A pixel has the class of the instances that cover it, 0 without any. It is ignored, 255, where
    instances of two classes overlap, as in torchvision's reference, and in crowds; the rule of
    published masks is not documented.
    """
    ids = np.zeros((scene.height, scene.width), np.uint8)
    for region in scene.regions:
        covered = _decode(region.segmentation, scene)
        claimed = covered & (ids != 0) & (ids != region.label)
        ids[covered] = region.label
        ids[claimed] = IGNORE
    return ids


def write_coco_mask(scene: Scene, path: Path) -> None:
    """Write the mask of an image as a palette PNG."""
    try:
        ids = draw_mask(scene)
        if not ids.size:
            raise ValueError(f"an image of {scene.height} x {scene.width} pixels")
    except Exception as error:  # pycocotools raises no narrower one
        raise UserError(
            f"{path}: cannot draw the regions that are annotated in this image ({error!r}); unpack "
            "the annotations again"
        ) from error
    save_mask(path, ids, KINDS["coco"].palette())


def _decode(segmentation: Any, scene: Scene) -> np.ndarray:
    """Return (height, width) bool of polygons, or of a run-length code, packed or not."""
    masks, size = _coco_masks(), (scene.height, scene.width)
    if isinstance(segmentation, list):
        code = masks.merge(masks.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        code = masks.frPyObjects(segmentation, *size)
    else:
        code = segmentation
    return masks.decode(code).astype(bool)


def _coco_masks() -> ModuleType:
    return import_extra("pycocotools.mask", "pycocotools", "it decodes COCO's regions")
