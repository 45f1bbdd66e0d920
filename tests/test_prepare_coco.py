import json

import numpy as np
import pytest
from PIL import Image

from dataset.catalog import KINDS
from dataset.prepare.coco import (
    Region,
    Scene,
    draw_mask,
    prepare_coco,
    read_scenes,
    write_coco_mask,
)
from dataset.reading import read_mask
from utils.errors import UserError

masks = pytest.importorskip("pycocotools.mask", reason="pycocotools decodes COCO's regions")

# pycocotools 2.0.11 and numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

COUNTS = {"train": 3, "val": 1}
UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # ids of COCO that no category has
CATEGORY_IDS = [number for number in range(1, 91) if number not in UNUSED]
CATEGORIES = [
    {"id": number, "name": name, "supercategory": "thing"}
    for number, name in zip(CATEGORY_IDS, KINDS["coco"].classes[1:], strict=True)
]
PERSON, CAR, TOOTHBRUSH = 1, 3, 90  # category ids; toothbrush is class 80


def box(left, top, right, bottom):
    """Return a polygon around these pixels of a 6 x 4 picture."""
    return [[left, top, right, top, right, bottom, left, bottom]]


def code(rows):
    """Run lengths of a mask, column by column, beginning with zeros, as COCO's crowds have them."""
    values = np.array(rows).ravel(order="F")
    changes = np.flatnonzero(np.diff(values)) + 1
    runs = np.diff([0, *changes, len(values)]).tolist()
    return {"size": list(np.shape(rows)), "counts": [0, *runs] if values[0] else runs}


def entry(image, category, segmentation, iscrowd=0):
    return {
        "image_id": image,
        "category_id": category,
        "segmentation": segmentation,
        "iscrowd": iscrowd,
    }


LEFT = [[1, 1, 0, 0, 0, 0]] * 4
RIGHT = [[0, 0, 0, 0, 1, 1]] * 4
PACKED = masks.encode(np.asfortranarray(np.array(RIGHT, np.uint8)))
ANNOTATIONS = {
    "train": {
        9: [entry(9, PERSON, box(0, 0, 2, 4)), entry(9, TOOTHBRUSH, box(4, 0, 6, 4))],
        25: [entry(25, CAR, box(0, 0, 4, 2)), entry(25, PERSON, code(LEFT), iscrowd=1)],
        30: [],
    },
    "val": {139: [entry(139, CAR, {"size": [4, 6], "counts": PACKED["counts"].decode()})]},
}


@pytest.fixture
def root(tmp_path):
    """COCO 2017 as its archives unpack, with four images."""
    (tmp_path / "annotations").mkdir()
    for split, by_image in ANNOTATIONS.items():
        (tmp_path / f"{split}2017").mkdir()
        images = []
        for number in by_image:
            name = f"{number:012d}.jpg"
            Image.new("RGB", (6, 4)).save(tmp_path / f"{split}2017" / name)
            images.append({"id": number, "file_name": name, "height": 4, "width": 6})
        found = {
            "images": images[::-1],
            "annotations": [entry for entries in by_image.values() for entry in entries],
            "categories": CATEGORIES[::-1],
        }
        (tmp_path / f"annotations/instances_{split}2017.json").write_text(json.dumps(found))
    return tmp_path


def drawn(*regions):
    return draw_mask(Scene(4, 6, [Region(*region) for region in regions])).tolist()


def test_polygon_and_both_run_length_codes_draw_the_same():
    expected = [[0, 0, 0, 0, 5, 5]] * 4
    assert drawn((box(4, 0, 6, 4), 5)) == expected
    assert drawn((code(RIGHT), 5)) == expected
    assert drawn((PACKED, 5)) == expected


def test_parts_of_an_instance_are_one_region():
    assert drawn((box(0, 0, 1, 4) + box(5, 0, 6, 4), 7)) == [[7, 0, 0, 0, 0, 7]] * 4


def test_overlap_of_two_classes_is_ignored_in_any_order():
    first, second = (code([[1, 1, 1, 1, 0, 0]] * 4), 3), (code([[0, 0, 1, 1, 1, 1]] * 4), 4)
    expected = [[3, 3, 255, 255, 4, 4]] * 4
    assert drawn(first, second) == drawn(second, first) == expected
    assert drawn(first, second, first) == expected


def test_overlap_of_one_class_keeps_the_class():
    first, second = (code([[1, 1, 1, 1, 0, 0]] * 4), 3), (code([[0, 0, 1, 1, 1, 1]] * 4), 3)
    assert drawn(first, second) == [[3] * 6] * 4


def test_crowd_is_ignored_over_instances_too():
    instance, crowd = (code([[0, 1, 1, 1, 0, 0]] * 4), 3), (code(LEFT), 255)
    expected = [[255, 255, 3, 3, 0, 0]] * 4
    assert drawn(instance, crowd) == drawn(crowd, instance) == expected


def test_class_ids_go_by_ascending_category_id(root):
    scenes = read_scenes(root / "annotations/instances_train2017.json")
    assert [region.label for region in scenes["000000000009"].regions] == [1, 80]
    assert [region.label for region in scenes["000000000025"].regions] == [3, 255]
    assert scenes["000000000030"] == Scene(4, 6, [])


@pytest.mark.parametrize("workers", [0, 2])
def test_masks_of_both_splits_are_written(root, workers):
    prepare_coco(root, download=False, workers=workers, counts=COUNTS)
    expected = {
        "000000000009": [[1, 1, 0, 0, 80, 80]] * 4,
        "000000000025": [[255, 255, 3, 3, 0, 0]] * 2 + [[255, 255, 0, 0, 0, 0]] * 2,
        "000000000030": [[0] * 6] * 4,
        "000000000139": [[0, 0, 0, 0, 3, 3]] * 4,
    }
    written = {path.stem: path for path in (root / "masks").iterdir()}
    assert {name: np.asarray(read_mask(written[name])).tolist() for name in written} == expected
    with Image.open(written["000000000009"]) as mask:
        assert (mask.mode, bytes(mask.getpalette())) == ("P", KINDS["coco"].palette())


def test_lists_are_those_that_training_reads(root, read_back):
    prepare_coco(root, download=False, workers=0, counts=COUNTS)
    assert (root / "train.txt").read_text() == (
        "train2017/000000000009.jpg masks/000000000009.png\n"
        "train2017/000000000025.jpg masks/000000000025.png\n"
        "train2017/000000000030.jpg masks/000000000030.png\n"
    )
    assert (root / "val.txt").read_text() == "val2017/000000000139.jpg masks/000000000139.png\n"
    assert [len(split) for split in read_back("coco", root)] == [1, 2, 1]


@pytest.mark.parametrize("text", ["{", "[]", '{"images": [], "annotations": []}'])
def test_annotations_of_another_kind_are_named(root, text):
    path = root / "annotations/instances_val2017.json"
    path.write_text(text)
    said = "cannot read instance annotations in it|holds no JSON"
    with pytest.raises(UserError, match=f"^{path}: ({said})"):
        prepare_coco(root, download=False, workers=0, counts=COUNTS)


@pytest.mark.parametrize(
    "spoilt",
    [5, [[1, 2]], [["a"] * 8], {"counts": "x" * 3}, {}, {"size": [9, 9], "counts": [0, 81]}],
    ids=str,
)
def test_a_region_that_is_none_is_named(root, spoilt):
    path = root / "annotations/instances_val2017.json"
    found = json.loads(path.read_text())
    found["annotations"][0]["segmentation"] = spoilt
    path.write_text(json.dumps(found))
    lost = root / "masks/000000000139.png"
    with pytest.raises(UserError, match=f"^{lost}: cannot draw the regions") as error:
        prepare_coco(root, download=False, workers=0, counts=COUNTS)
    assert "\n" not in str(error.value)
    assert not lost.exists()


def test_an_image_without_pixels_is_named(tmp_path):
    with pytest.raises(UserError, match=r"x\.png: cannot draw .*an image of 0 x 6 pixels"):
        write_coco_mask(Scene(0, 6, []), tmp_path / "x.png")


def test_other_categories_are_refused(root):
    path = root / "annotations/instances_val2017.json"
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": CATEGORIES[1:]}))
    with pytest.raises(UserError, match=r"its categories are not the 80 of COCO 2017"):
        prepare_coco(root, download=False, workers=0, counts=COUNTS)
