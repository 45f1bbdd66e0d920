"""COCO's JSON."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset.prepare.labels.drawing import fill_polygons, fill_runs, ignored_box, refuse_size
from dataset.prepare.labels.export import label_of, regions_of, rest_of
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
from utils.files import read_json, write_json
from utils.progress import no_bar


def read_coco(source: Source) -> Found:
    """Read COCO's JSON: polygons and run lengths, as pycocotools draws them.

    A crowd is of its class, since CVAT writes every mask as one. An image without annotations
    counts as not labeled.

    Raises:
        UserError: no COCO file, a malformed one, or no pycocotools.
    """
    require("pycocotools")
    files = {path: read_json(path) for path in source.files("*.json")}
    keys = ("images", "annotations", "categories")
    labels: list[str] = []
    images: list[LabeledImage] = []
    for path, content in files.items():
        if not isinstance(content, dict) or any(key not in content for key in keys):
            continue
        with readable_labels(path):
            categories = sorted(content["categories"], key=lambda each: each["id"])
            names = {each["id"]: each["name"] for each in categories}
            entries = defaultdict(list)
            for entry in content["annotations"]:
                entries[entry["image_id"]].append(entry)
            # Roboflow lists a group of categories as one of them.
            used = {names.get(entry["category_id"]) for entry in content["annotations"]}
            groups = {each.get("supercategory") for each in categories} - used
            labels += [name for name in names.values() if name not in groups]
            for number in entries.keys() - {each["id"] for each in content["images"]}:
                source.notes["annotations of no image, left out"] += [str(path)] * len(
                    entries[number]
                )
            for each in content["images"]:
                if (picture := source.find(each["file_name"], path)) is None:
                    continue
                size, found = (each["height"], each["width"]), entries.get(each["id"])
                regions = partial(_coco_regions, path, names, found, size) if found else None
                split = source.split_of(path, picture.parent)
                images.append(LabeledImage(picture, split, regions))
    if not images:
        raise UserError(
            f"{source.labels}: no JSON file with {', '.join(keys)} that names a picture below "
            f"{source.base}; --images DIR names their folder"
        )
    return Found(with_background(labels), source.with_rest(images), "ignored")


def _coco_regions(
    path: Path,
    names: Mapping[int, str],
    entries: Sequence[Mapping[str, Any]],
    expected: Size,
    size: Size,
    notes: Notes,
) -> Iterator[Region]:
    refuse_size(expected, size)
    with readable_labels(path):
        for entry in entries:
            category, shape = entry["category_id"], entry.get("segmentation")
            name = class_name(names.get(category, f"category {category}"))
            if isinstance(shape, dict):
                refuse_size(tuple(shape["size"]), size)
                yield Region(name, fill_runs(shape))
            elif shape:
                yield Region(name, fill_polygons(shape, size))
            elif entry.get("bbox"):
                left, top, width, height = entry["bbox"]
                yield ignored_box((left, top, left + width, top + height), size, notes)


def write_coco(labels: PseudoLabels, out: Path) -> None:
    """Write ``annotations.json``: run lengths of each region, but none of the background."""
    require("pycocotools")
    from pycocotools import mask

    ids, rest = [*range(len(labels.kind.classes)), IGNORE], rest_of(labels)
    numbers = {id_: number for number, id_ in enumerate(ids, start=1) if id_ != rest}
    images, annotations = [], []
    for number, sample in enumerate(tqdm(labels.samples, "regions", disable=no_bar()), start=1):
        found = read_ids(sample.mask)
        height, width = found.shape
        images.append({"id": number, "file_name": sample.name, "height": height, "width": width})
        for id_, box, part in regions_of(found):
            if id_ == rest:
                continue
            whole = np.zeros(found.shape, np.uint8, order="F")
            whole[box] = part
            runs = mask.encode(whole)
            entry = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": numbers[id_],
                "segmentation": {**runs, "counts": runs["counts"].decode()},
                "area": int(np.count_nonzero(part)),
                "bbox": mask.toBbox(runs).tolist(),
                "iscrowd": 0,
            }
            annotations.append(entry)
    categories = [{"id": number, "name": label_of(labels, id_)} for id_, number in numbers.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json(out / "annotations.json", content)
