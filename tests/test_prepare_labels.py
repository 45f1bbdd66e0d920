"""Masks and lists from labeling tools."""

import base64
import json

import numpy as np
import pytest
from conftest import SHARED, refusal
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset.lists import read_label, read_lists, read_splits
from dataset.prepare import __main__ as program
from dataset.prepare.labels.drawing import draw, fill_polygons
from dataset.prepare.labels.records import Notes, Region, Source
from dataset.reading import read_ids
from utils.config.schema import DatasetSection
from utils.panels import encode

pycocotools = pytest.importorskip("pycocotools.coco", reason="pycocotools draws polygons")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SIZE = (4, 6)
CLASSES = ["background", "disc", "box"]


@pytest.fixture
def source(tmp_path):
    """A folder of the pictures a.png to d.png, 6 x 4."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name, colour in zip("abcd", ("red", "green", "blue", "white"), strict=True):
        Image.new("RGB", SIZE[::-1], colour).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def labels(answer, tmp_path):
    """Run ``dataset.prepare labels``; return what it printed, and the masks by image name."""

    def run(tool, folder, *words, root=tmp_path / "root"):
        said = answer(program, "labels", "--from", tool, folder, "--root", root, *words)
        masks = {
            path.stem: read_ids(path).tolist()
            for path in (root / f"masks_from_{tool}").rglob("*.png")
        }
        return said, masks

    return run


def rows(text):
    """Ids from digits, 9 is ignored."""
    return [[255 if digit == "9" else int(digit) for digit in row] for row in text.split()]


def listed(root, name):
    return (root / f"{name}.txt").read_text().splitlines()


def coco(folder, annotations, sizes=SIZE):
    names = sorted(path.name for path in folder.glob("*.png"))
    height, width = sizes
    content = {
        "images": [
            {"id": number, "file_name": name, "height": height, "width": width}
            for number, name in enumerate(names)
        ],
        "categories": [{"id": 7, "name": "box"}, {"id": 3, "name": "disc"}],
        "annotations": [{"id": number, "iscrowd": 0, **x} for number, x in enumerate(annotations)],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    return content


def square(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


def test_coco_by_hand(source, labels, tmp_path):
    runs = {"size": [4, 6], "counts": [20, 4]}  # the last column
    coco(
        source,
        [
            {
                "image_id": 0,
                "category_id": 3,
                "segmentation": [square(0, 0, 2, 2), square(4, 3, 5, 4)],
            },
            {"image_id": 0, "category_id": 7, "segmentation": [square(1, 0, 3, 1)]},  # overlaps
            {"image_id": 1, "category_id": 7, "segmentation": runs},
            {
                "image_id": 1,
                "category_id": 3,
                "segmentation": {**runs, "counts": [0, 1, 23]},
                "iscrowd": 1,
            },
            {"image_id": 2, "category_id": 3, "bbox": [0, 2, 3, 2]},
            {"image_id": 2, "category_id": 3, "segmentation": [[0, 0, 1, 1]]},
            {"image_id": 2, "category_id": 8, "segmentation": [square(5, 0, 6, 1)]},
            {"image_id": 9, "category_id": 3, "segmentation": [square(5, 0, 6, 1)]},
        ],
    )
    said, masks = labels("coco", source)
    assert masks == {
        "a": rows("192000 110000 000000 000010"),
        "b": rows("100002 000002 000002 000002"),
        "c": rows("000009 000000 999000 999000"),
    }
    root = tmp_path / "root"
    assert listed(root, "labeled") == [
        f"images/{x}.png masks_from_coco/images/{x}.png" for x in "abc"
    ]
    assert listed(root, "unlabeled") == ["images/d.png"]
    unknown = "regions of 'category 8', which is no class: their pixels are ignored"
    left_out = ["boxes, whose pixels are ignored", unknown, "regions without a pixel"]
    assert said[2:] == [
        "no image is for validation: --val 1/5 takes a fifth of the labeled ones",
        "left out, or worth a look:",
        f"  1 annotations of no image, left out, such as in {source}/instances.json",
        *(f"  1 {what}, such as in {source}/c.png" for what in left_out),
        "1 pixels of 1 images lie in regions of two classes: they are ignored; --overlaps "
        "{ignored,later,smaller} chooses",
        "keys of a config that reads it:",
        "dataset:",
        "  kind: custom",
        f"  root: {root}",
        "  classes: [background, disc, box]",
    ]
    _, masks = labels("coco", source, "--overlaps", "later", root=tmp_path / "later")
    assert masks["a"][0] == [1, 2, 2, 0, 0, 0]
    _, masks = labels("coco", source, "--overlaps", "smaller", root=tmp_path / "smaller")
    assert masks["a"][0] == [1, 2, 2, 0, 0, 0]


@given(st.lists(st.tuples(st.floats(-5, 30), st.floats(-5, 20)), min_size=3, max_size=9))
def test_polygons_are_those_of_pycocotools(points):
    found = pycocotools.COCO()
    found.imgs = {0: {"height": 16, "width": 24}}
    polygon = [float(x) for point in points for x in point]
    entry = {"image_id": 0, "segmentation": [polygon, square(1, 1, 3, 4)]}
    expected = found.annToMask(entry)
    assert np.array_equal(fill_polygons(entry["segmentation"], (16, 24)), expected)


def labelme(folder, name, shapes, **more):
    kinds = {"shape_type": "polygon", "group_id": None, "flags": {}}
    shapes = [{**kinds, "label": label, "points": points, **x} for label, points, x in shapes]
    content = {"version": "6.3.1", "shapes": shapes, "imagePath": f"{name}.png", "imageData": None}
    content |= {"imageHeight": 4, "imageWidth": 6, **more}
    (folder / f"{name}.json").write_text(json.dumps(content))


def corners(left, top, right, bottom):
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def test_labelme_by_hand(source, labels):
    """labelme draws the pixels on a border too, and later shapes over earlier ones."""
    part = Image.fromarray(np.array([[True, False], [True, True]]))
    mask = base64.b64encode(encode(part)).decode()
    labelme(
        source,
        "a",
        [
            ("disc", corners(0, 0, 3, 3), {}),
            ("_background_", corners(1, 1, 2, 2), {}),
            ("box", [[5, 3], [4, 2]], {"shape_type": "rectangle"}),
            ("__ignore__", corners(5, 0, 5, 1), {}),
            ("way", [[0, 0], [3, 3]], {"shape_type": "line"}),
        ],
    )
    labelme(source, "b", [("box", [[2, 1], [3, 2]], {"shape_type": "mask", "mask": mask})])
    labelme(source, "c", [], imageHeight=5)
    said, masks = labels("labelme", source)
    assert masks == {
        "a": rows("222209 200209 200211 222211"),
        "b": rows("000000 001000 001100 000000"),
    }
    assert said[-1] == "  classes: [background, box, disc]"
    assert f"  1 shapes of type line, left out, such as in {source}/a.png" in said
    assert (
        f"  1 images of another size than their labels, left out, such as in {source}/c.png" in said
    )


def test_labelme_beside_moved_pictures(source, labels, tmp_path):
    """The path in the file is another machine's; the picture beside it has its name."""
    labelme(source, "a", [("disc", corners(0, 0, 3, 3), {})], imagePath="C:\\work\\old.png")
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    labelme(folder, "b", [("box", corners(0, 0, 0, 3), {})], imagePath="..\\source\\b.png")
    _, masks = labels("labelme", source, root=tmp_path)
    assert masks == {"a": rows("111100 111100 111100 111100")}
    (folder / "labels.txt").write_text("__ignore__\n_background_\ncat\nbox\n")
    said, masks = labels("labelme", folder, "--images", source, root=tmp_path / "other")
    assert masks == {"b": rows("200000 200000 200000 200000")}
    assert said[-1] == "  classes: [background, cat, box]"


def test_yolo_by_hand(tmp_path, labels):
    folder = tmp_path / "set"
    for split, name in (("train", "a"), ("train", "b"), ("train", "c"), ("valid", "d")):
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        Image.new("L", (6, 4)).save(folder / split / f"images/{name}.png")
    (folder / "data.yaml").write_text("names: {1: box, 0: disc}\ntrain: ../train/images\n")
    text = "0 0 0 0.5 0 0.5 0.5 0 0.5\n1 0 0 0.3333333 0 0.3333333 0.25 0 0.25\n"
    (folder / "train/labels/a.txt").write_text(text + "1 0.75 0.75 0.5 0.5\n")
    (folder / "train/labels/b.txt").write_text("")
    (folder / "valid/labels/d.txt").write_text("1 0.5 0 1 0 1 1 0.5 1\n")
    said, masks = labels("yolo", folder)
    assert masks == {
        "a": rows("221000 111000 000999 000999"),
        "b": [[0] * 6] * 4,
        "d": rows("000222 000222 000222 000222"),
    }
    assert [line.split(": ")[1] for line in said[:3]] == ["2 images", "1 images", "1 images"]
    assert said[-1] == "  classes: [background, disc, box]"
    place = f"{folder}/train/images/b.png"
    assert f"  1 labeled images of background alone, such as in {place}" in said
    (folder / "train/labels/a.txt").write_text("0 0 0 50 0 50 50\n")
    with_pixels = refusal(labels, "yolo", folder, root=tmp_path / "new")
    assert "a.txt: malformed labels" in with_pixels
    assert "coordinates are shares, from 0 to 1" in with_pixels


XML = """<annotations><version>1.1</version><meta><task><labels>
<label><name>disc</name><color>#ff0000</color></label><label><name>box</name></label>
</labels></task></meta>
<image id="0" name="a.png" width="6" height="4">
<polygon label="box" points="0,0;3,0;3,2;0,2" z_order="1"/>
<polygon label="disc" points="0,0;6,0;6,1;0,1" z_order="0"/>
<mask label="disc" rle="1,3" left="4" top="2" width="2" height="2" z_order="2"/>
<points label="disc" points="1,1" z_order="0"/>
</image>
<image id="1" name="b.png" width="6" height="4"><box label="box" xtl="1" ytl="1" xbr="3.2" ybr="2"/>
</image><image id="2" name="c.png" width="6" height="4"><tag label="box"/></image></annotations>
"""


def test_cvat_xml_by_hand(source, labels, tmp_path):
    (source / "annotations.xml").write_text(XML)
    said, masks = labels("cvat", source)
    assert masks == {
        "a": rows("222111 222000 000001 000011"),
        "b": rows("000000 099000 000000 000000"),
    }
    assert listed(tmp_path / "root", "unlabeled") == ["images/c.png", "images/d.png"]
    assert f"  1 shapes of type points, left out, such as in {source}/a.png" in said
    assert "3 pixels of 1 images lie in regions of two classes: the later" in said[-6]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")
@pytest.mark.parametrize(
    ("tool", "case", "words", "counts"),
    [
        ("cvat", "cvat", [], (7, 5, 0)),
        ("roboflow", "roboflow", [], (4, 0, 3)),
        ("folders", "base", ["--classes", ",".join(CLASSES)], (7, 6, 0)),
        ("folders", "grey_as_rgb", ["--classes", ",".join(CLASSES), "--val", "1/7"], (6, 6, 1)),
        (
            "folders",
            "rgb",
            ["--class-map", "{'#000000': background, '#800000': disc, '#008000': box}"],
            (7, 6, 0),
        ),
    ],
)
def test_masks_of_tools(labels, tmp_path, tool, case, words, counts):
    folder, root = SHARED / "cases" / case, tmp_path / "root"
    said, masks = labels(tool, folder, *words)
    assert said[-1] == "  classes: [background, disc, box]"
    assert not any(line.startswith("left out") for line in said)
    files = [root / f"{name}.txt" for name in ("labeled", "unlabeled", "val")]
    assert tuple(len(x.read_text().splitlines()) if x.exists() else 0 for x in files) == counts
    first = next(masks[name] for name in sorted(masks) if "000" in name)
    assert first == read_ids(SHARED / "cases/base/masks/000.png").tolist()
    if counts[2] and counts[1]:
        keys = {"kind": "custom", "root": str(root), "classes": CLASSES}
        read_splits(DatasetSection(**keys))


def test_pairs_of_folders(tmp_path, labels):
    """Masks have their image's place but for words such as 'masks', or its name and an ending."""
    files = ["a/images/1.jpg", "a/masks/1.png", "b/images/1.jpg", "b/masks/1_labels.png"]
    files += ["c/x.jpg", "c/x-mask.png", "train_images/2.jpg", "train_masks/2.png"]
    files += ["JPEGImages/3.jpg", "SegmentationClass/3.png", "SegmentationObject/3.png", "4.jpg"]
    files += ["masks/5.png", "photos/6.jpg", "masks/6.png", "seg/images/7.jpg", "c/1.jpg"]
    files += ["d/8.jpeg", "d/8.png"]
    for number, name in enumerate(files):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        value = number % 7 if name.endswith("png") else 100 + number
        Image.new("L", (2, 2), value).save(tmp_path / "set" / name)
    root, names = tmp_path / "set", ",".join("abcdefg")
    said, _ = labels("folders", root, "--classes", names, root=root)
    section = DatasetSection(
        kind="custom", root=str(root), classes=list("abcdefg"), val="labeled.txt", unlabeled="4.*"
    )
    pairs = {
        x.name: read_label(x).getpixel((0, 0)) for x in read_lists(section, ("labeled",)).labeled
    }
    masks = {
        files[number - 1]: number % 7
        for number, name in enumerate(files)
        if "Object" not in name and name.endswith("png") and number and "5" not in name
    }
    assert pairs == masks
    assert listed(root, "unlabeled") == ["4.jpg", "c/1.jpg", "seg/images/7.jpg"]
    assert f"  1 masks without an image of their name, such as in {root}/masks/5.png" in said
    assert labels("folders", root, "--classes", names, root=root)[0] == said  # the same again
    Image.new("L", (2, 2)).save(root / "a/1.png")
    told = refusal(labels, "folders", root, "--classes", names, root=root)
    assert "a/images/1.jpg: has the name of" in told
    assert "rename or remove one" in told


def test_folder_of_masks_alone(source, labels):
    """Whatever it is called, where --images names the folder of the images."""
    folder = source.parent / "truth"
    folder.mkdir()
    Image.new("L", SIZE[::-1], 1).save(folder / "b.png")
    _, masks = labels("folders", folder, "--images", source, "--classes", "cat,dog")
    assert masks == {"b": [[1] * 6] * 4}


def test_nothing_is_overwritten(source, labels, tmp_path):
    labelme(source, "a", [("disc", corners(0, 0, 3, 3), {})])
    labelme(source, "b", [("box", corners(0, 0, 3, 3), {})])
    said, before = labels("labelme", source)
    files = {path: path.read_bytes() for path in (tmp_path / "root").rglob("*.*")}
    assert labels("labelme", source) == (said, before)
    labelme(source, "a", [("disc", corners(0, 0, 2, 3), {})])
    assert "a.png: is there with other labels; move it away" in refusal(labels, "labelme", source)
    labelme(source, "a", [("disc", corners(0, 0, 3, 3), {})])
    (source / "c.png").replace(source / "e.png")
    assert "unlabeled.txt: is there with other lines" in refusal(labels, "labelme", source)
    Image.new("RGB", SIZE[::-1], "black").save(source / "d.png")
    assert "d.png is another picture; name a new --root" in refusal(labels, "labelme", source)
    assert {path: path.read_bytes() for path in files} == files
    labelme(source, "d", [("disc", corners(0, 0, 3, 3), {})])
    said, _ = labels("labelme", source, "--lists", tmp_path / "lists", root=tmp_path / "other")
    assert said[-1] == f"  unlabeled: {tmp_path}/lists/unlabeled.txt"
    assert len(listed(tmp_path / "lists", "labeled")) == 3


def test_a_root_among_the_pictures_is_refused(source, labels):
    """Its copies of the pictures would be found beside them by the same command again."""
    labelme(source, "a", [("disc", corners(0, 0, 3, 3), {})])
    line = refusal(labels, "labelme", source, root=source / "out")
    assert line == (
        f"--root: {source / 'out'} lies in {source}, where the pictures are looked for; name "
        f"{source} itself, or a folder outside of it"
    )
    assert not (source / "out").exists()


def test_classes_keep_their_ids(source, labels):
    labelme(source, "a", [("disc", corners(0, 0, 1, 3), {}), ("cat", corners(5, 0, 5, 3), {})])
    said, masks = labels("labelme", source, "--classes", "cube,disc,background")
    assert masks["a"] == rows("112229 112229 112229 112229")
    assert any("1 regions of 'cat', which is no class: their pixels are ignored" in x for x in said)
    _, masks = labels("labelme", source, "--classes", "cube,disc,cat", root=source.parent / "new")
    assert masks["a"] == rows("119992 119992 119992 119992")  # there is no background


@pytest.mark.parametrize(
    ("tool", "told"),
    [
        ("coco", "no JSON file with images, annotations, categories that names a picture"),
        ("labelme", "no JSON file of labelme whose picture is here; --images DIR"),
        ("yolo", "names no class; write them into a classes.txt there"),
        ("cvat", "export the task as 'CVAT for images 1.1' or 'Segmentation mask 1.1'"),
        ("roboflow", "names no class"),
        ("folders", "nothing tells what the ids of masks mean; add --classes"),
    ],
)
def test_source_of_another_tool(source, labels, tool, told):
    assert told in refusal(labels, tool, source)
    assert "no such file or folder" in refusal(labels, tool, source / "gone")
    (source / "set.zip").touch()
    assert "set.zip: is an archive; unpack it" in refusal(labels, tool, source / "set.zip")


def test_source_that_is_damaged(source, labels):
    labelme(source, "a", [("disc", [["x", 1], [2, 3], [4, 4]], {})])
    assert "a.json: malformed labels" in refusal(labels, "labelme", source)
    (source / "a.json").write_text("{")
    assert "a.json: holds no JSON" in refusal(labels, "labelme", source)
    content = coco(source, [{"image_id": 0, "category_id": 3, "segmentation": [[1e30] * 8]}])
    (source / "a.json").unlink()
    assert "instances.json: malformed labels" in refusal(labels, "coco", source)
    del content["categories"][0]["name"]
    (source / "instances.json").write_text(json.dumps(content))
    assert "instances.json: malformed labels (KeyError('name'))" in refusal(labels, "coco", source)
    (source / "annotations.xml").write_text("<annotations>")
    assert "annotations.xml: not XML" in refusal(labels, "cvat", source)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--val", "2"], "--val: '2' is no share between 0 and 1"),
        (["--val", "1e-999999999"], "--val: '1e-999999999' is no share between 0 and 1"),
        (["--classes", "a,,b"], "--classes: a class without a name in 'a,,b'"),
        (["--classes", "a,a"], "--classes: two classes have one name"),
        (["--classes", "a"], "has 1 classes"),
        (["--classes", ",".join(f"class {n}" for n in range(300))], "has 300 classes"),
        (["--classes", "binary.txt"], "binary.txt: cannot read this as UTF-8 text ("),
        (["--class-map", "{"], "--class-map: '{' is not YAML"),
        (["--class-map", "{70000: a}"], "--class-map: '{70000: a}' is not allowed: ids in mask"),
        (["--images", "gone"], "gone: no picture is here; name their folder with --images DIR"),
    ],
)
def test_words_that_are_wrong(source, labels, words, told, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    labelme(source, "a", [("disc", corners(0, 0, 1, 3), {})])
    assert told in refusal(labels, "labelme", source, *words)


def test_splits_come_from_names_of_folders(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    source = Source(tmp_path)
    told = {"x/train2017": "train", "valid/images": "val", "instances_val2017.json": "val"}
    told |= {"test": "test", "photos": "train", "trainings": "train", "latest": "train"}
    assert {name: source.split_of(tmp_path / name) for name in told} == told


def test_third_class_on_an_overlap_stays_ignored():
    covered = np.ones((1, 1), bool)
    regions = [Region(name, covered) for name in ("a", "b", "c")]
    ids, contested = draw(regions, (1, 1), ["a", "b", "c"], "ignored", Notes())
    assert ids.tolist() == [[255]]
    assert contested == 1
