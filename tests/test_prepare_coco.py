import json
import re
from itertools import chain

import numpy as np
import pytest
from conftest import refusal
from PIL import Image

from dataset.catalog import KINDS
from dataset.prepare.coco import COCO_2017, draw_mask
from dataset.prepare.work import prepare
from dataset.reading import read_mask

coco = pytest.importorskip("pycocotools.coco", reason="pycocotools decodes COCO's regions")

# pycocotools 2.0.11 and numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SMALL = COCO_2017._replace(counts={"train": 3, "val": 1})
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
    regions = {"segmentation": segmentation, "iscrowd": iscrowd}
    return {"image_id": image, "category_id": category, **regions}


def content_of(images, entries):
    """Return what an annotation file holds; the order of categories is none of COCO's."""
    annotations = [{"id": number, **each} for number, each in enumerate(entries)]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES[::-1]}


LEFT = [[1, 1, 0, 0, 0, 0]] * 4
RIGHT = [[0, 0, 0, 0, 1, 1]] * 4
PACKED = coco.maskUtils.encode(np.asfortranarray(np.array(RIGHT, np.uint8)))
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
        found = content_of(images[::-1], chain(*by_image.values()))
        (tmp_path / f"annotations/instances_{split}2017.json").write_text(json.dumps(found))
    return tmp_path


def drawn(*regions):
    """Draw (segmentation, class id, or 255 for a crowd) as an image."""
    found = coco.COCO()
    entries = [
        entry(7, PERSON if label == 255 else CATEGORY_IDS[label - 1], region, label == 255)
        for region, label in regions
    ]
    found.dataset = content_of([{"id": 7, "height": 4, "width": 6}], entries)
    found.createIndex()
    return draw_mask(found, 7).tolist()


def test_polygon_and_both_run_length_codes_draw_the_same():
    expected = [[0, 0, 0, 0, 5, 5]] * 4
    assert drawn((box(4, 0, 6, 4), 5)) == expected
    assert drawn((code(RIGHT), 5)) == expected
    assert drawn((PACKED, 5)) == expected


def test_overlap_of_two_classes_is_ignored_in_any_order():
    first, second = (code([[1, 1, 1, 1, 0, 0]] * 4), 3), (code([[0, 0, 1, 1, 1, 1]] * 4), 4)
    expected = [[3, 3, 255, 255, 4, 4]] * 4
    assert drawn(first, second) == drawn(second, first) == expected
    assert drawn(first, second, first) == expected


def test_crowd_is_ignored_over_instances_too():
    instance, crowd = (code([[0, 1, 1, 1, 0, 0]] * 4), 3), (code(LEFT), 255)
    expected = [[255, 255, 3, 3, 0, 0]] * 4
    assert drawn(instance, crowd) == drawn(crowd, instance) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_set_is_what_training_reads(root, read_back, workers):
    prepare(SMALL, root, False, workers)
    expected = {
        "000000000009": [[1, 1, 0, 0, 80, 80]] * 4,
        "000000000025": [[255, 255, 3, 3, 0, 0]] * 2 + [[255, 255, 0, 0, 0, 0]] * 2,
        "000000000030": [[0] * 6] * 4,
        "000000000139": [[0, 0, 0, 0, 3, 3]] * 4,
    }
    written = {path.stem: path for path in (root / "masks").iterdir()}
    assert {name: np.asarray(read_mask(written[name])).tolist() for name in written} == expected
    line = "train2017/{0:012}.jpg masks/{0:012}.png\n".format
    assert (root / "train.txt").read_text() == "".join(map(line, (9, 25, 30)))
    assert (root / "val.txt").read_text() == "val2017/000000000139.jpg masks/000000000139.png\n"
    assert [len(split) for split in read_back("coco", root)[:3]] == [1, 2, 1]


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("images", 5, "instances_val2017.json"),
        ("annotations", [{"id": 1, "image_id": 139}], "instances_val2017.json"),
        ("annotations", [{"id": 1, **entry(139, CAR, [[1, 2]])}], "image 139"),
    ],
)
def test_malformed_annotations_are_refused_in_one_line(root, key, value, named):
    path = root / "annotations/instances_val2017.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, key: value}))
    line = refusal(prepare, SMALL, root, False, 0)
    assert re.search(r"malformed annotations .*unpack the file again$", line)
    assert named in line


def test_other_files_are_refused(root):
    path = root / "annotations/instances_val2017.json"
    path.write_text(json.dumps({"images": [], "annotations": [], "categories": CATEGORIES[1:]}))
    assert "its categories are not the 80 of COCO 2017" in refusal(prepare, SMALL, root, False, 0)
    path.with_name("instances_train2017.json").write_text("{")
    line = refusal(prepare, SMALL, root, False, 0)
    assert "instances_train2017.json: malformed annotations" in line
