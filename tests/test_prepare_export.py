"""Pseudo labels written for labeling tools, and read back."""

import json
import shlex

import numpy as np
import pytest
import yaml
from conftest import refusal
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from dataset.catalog import KINDS
from dataset.prepare import __main__ as program
from dataset.prepare.labels.export import regions_of
from dataset.prepare.labels.labelme import outline
from dataset.reading import read_ids
from utils.files import write_csv
from utils.panels import save_mask

pycocotools = pytest.importorskip("pycocotools.coco", reason="pycocotools reads COCO's regions")
pytest.importorskip("skimage", reason="scikit-image finds regions")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CLASSES = ["background", "disc", "box"]
TOOLS = ["coco", "labelme", "cvat"]


def scene(seed, size=(40, 56)):
    """Overlapping discs and boxes, a ring, doubtful noise: class ids and 255."""
    rng = np.random.default_rng(seed)
    picture = Image.new("L", size[::-1])
    pen = ImageDraw.Draw(picture)
    for _ in range(9):
        x, y, side = rng.integers(-5, size[1]), rng.integers(-5, size[0]), rng.integers(2, 20)
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        shape([x, y, x + side, y + side], rng.choice([0, 1, 2, 255]).item(), 1)
    ids = np.array(picture)
    ids[rng.random(size) < 0.03] = 255
    return ids


@pytest.fixture
def run(tmp_path):
    """A run folder with pseudo labels of four images, two of them written again by stage 5."""
    root, folder = tmp_path / "data", tmp_path / "out" / "mine"
    dataset = {"kind": "custom", "root": str(root), "classes": CLASSES}
    augment = {"base_size": 64, "crop_size": 48}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"name": "mine", "dataset": dataset, "augment": augment})
    )
    names = [f"photos/{letter}.jpg" for letter in "abcd"]
    for number, name in enumerate(names):
        (root / "photos").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (56, 40), (number, 0, 0)).save(root / name)
    for stage, part, seed in (("2_pseudo_label", names, 10), ("5_relabel", names[2:], 0)):
        write_csv(
            folder / stage / "confidence.csv", ("image", "confidence"), [(x, 1) for x in part]
        )
        for name in part:
            mask = (folder / stage / "masks" / name).with_suffix(".png")
            save_mask(mask, scene(seed + names.index(name)), KINDS["demo"].palette())
    return folder


EXPECTED = {letter: scene(seed) for letter, seed in zip("abcd", (10, 11, 2, 3), strict=True)}


@pytest.mark.parametrize("tool", TOOLS)
def test_round_trip(run, answer, tool):
    """What an export prints reads it back: the same pixels, open ones among them."""
    said = answer(program, "export-labels", run, "--to", tool)
    open_ = np.mean([mask == 255 for mask in EXPECTED.values()])
    assert said[0] == (
        f"{run / f'labels_{tool}'}: 4 images; {open_:.1%} of the pixels, whose probability is "
        "below pseudo_label.threshold=0, are left open as '__ignore__'"
    )
    words = shlex.split(said[-1])
    assert words[:3] == ["python", "-m", "dataset.prepare"]
    said = answer(program, *words[3:])
    root = run.parents[1] / "data"
    for letter, ids in EXPECTED.items():
        assert np.array_equal(read_ids(root / f"masks_from_{tool}/photos/{letter}.png"), ids)
    assert not any(line.startswith("left out") for line in said)
    lines = (root / "corrected/labeled.txt").read_text().splitlines()
    assert lines == [f"photos/{x}.jpg masks_from_{tool}/photos/{x}.png" for x in "abcd"]


@pytest.mark.parametrize("tool", TOOLS)
def test_round_trip_without_a_background(run, answer, tool):
    """Every region is drawn; what none covers would be ignored."""
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("- background", "- road, wet"))
    words = shlex.split(answer(program, "export-labels", run, "--to", tool)[-1])
    said = answer(program, *words[3:])
    assert "  classes: ['road, wet', disc, box]" in said
    for letter, ids in EXPECTED.items():
        mask = run.parents[1] / f"data/masks_from_{tool}/photos/{letter}.png"
        assert np.array_equal(read_ids(mask), ids)


def test_coco_export_as_pycocotools_reads_it(run, answer):
    answer(program, "export-labels", run, "--to", "coco")
    found = pycocotools.COCO(run / "labels_coco/annotations.json")
    names = {id_: each["name"] for id_, each in found.cats.items()}
    assert sorted(names.values()) == ["__ignore__", "box", "disc"]
    for id_, image in found.imgs.items():
        expected, drawn = EXPECTED[image["file_name"][7]], np.zeros((40, 56), np.uint8)
        for entry in found.imgToAnns[id_]:
            mask = found.annToMask(entry).astype(bool)
            assert not drawn[mask].any()
            label = {"__ignore__": 255, "disc": 1, "box": 2}[names[entry["category_id"]]]
            drawn[mask] = label
            assert entry["area"] == mask.sum()
            left, top, width, height = map(int, entry["bbox"])
            assert mask[top : top + height, left : left + width].sum() == mask.sum()
        assert np.array_equal(drawn, expected)


def test_labelme_export_is_what_labelme_reads(run, answer):
    answer(program, "export-labels", run, "--to", "labelme", "--out", run / "own")
    path = run / "own/photos/a.json"
    content = json.loads(path.read_text())
    wanted = ["version", "imageData", "imagePath", "shapes", "flags", "imageHeight", "imageWidth"]
    assert set(wanted) == set(content)  # the keys of labelme's LabelFile.load
    assert (path.parent / content["imagePath"]).resolve() == run.parents[1] / "data/photos/a.jpg"
    assert all(len(shape["points"]) > 2 for shape in content["shapes"])
    assert (run / "own/labels.txt").read_text().split() == ["__ignore__", *CLASSES]


def test_cvat_export(run, answer):
    answer(program, "export-labels", run, "--to", "cvat")
    lines = (run / "labels_cvat/labelmap.txt").read_text().splitlines()
    colours = ["background:0,0,0::", "disc:128,0,0::", "box:0,128,0::", "__ignore__:255,255,255::"]
    assert lines[1:] == colours
    listed = (run / "labels_cvat/ImageSets/Segmentation/default.txt").read_text().split()
    assert listed == [f"photos/{letter}" for letter in "abcd"]
    with Image.open(run / "labels_cvat/SegmentationClass/photos/a.png") as mask:
        assert mask.mode == "RGB"


MASKS = st.tuples(st.integers(1, 7), st.integers(1, 7)).flatmap(
    lambda size: st.lists(
        st.sampled_from([0, 0, 1, 2]), min_size=size[0] * size[1], max_size=size[0] * size[1]
    ).map(lambda values: np.array(values, np.uint8).reshape(size))
)


@given(MASKS)
def test_outlines_draw_every_region(ids):
    """Drawn in their order, as labelme draws them, outlines give the mask they were made from."""
    picture = Image.new("L", ids.shape[::-1], 9)
    for id_, box, part in regions_of(ids):
        points = outline(part) + np.array([box[1].start, box[0].start])
        assert len(points) > 2
        ImageDraw.Draw(picture).polygon(list(map(tuple, points.tolist())), id_, id_)
    assert np.array_equal(np.asarray(picture), ids)


@pytest.mark.parametrize("tool", TOOLS)
def test_chosen_images_alone(run, answer, tmp_path, tool):
    (tmp_path / "list.txt").write_text("photos/c.jpg\n")
    said = answer(program, "export-labels", run, "--to", tool, "--images", tmp_path / "list.txt")
    assert ": 1 images; " in said[0]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"image,confidence\nphotos/a.jpg,x\n", "'x' is no such number"),
        (b"image,confidence\nphotos/a.jpg,nan\n", "'nan' is no such number"),
        (b"image,confidence\nphotos/a.jpg\n", ":2: has not 2 cells"),
        (b"image,confidence\n../a.jpg,1\n", "../a.jpg leaves the data root"),
        (b"a,b\n", "its columns are not image, confidence"),
        (b"\xff\xfe", "cannot read this file (no table)"),
    ],
)
def test_a_damaged_table_is_named(run, answer, content, told):
    table = run / "2_pseudo_label" / "confidence.csv"
    table.write_bytes(content)
    line = refusal(answer, program, "export-labels", run, "--to", "cvat")
    assert line.startswith(f"{table}")
    assert told in line
    assert line.endswith("with --from-stage 2")


def test_export_that_cannot_be(run, answer, tmp_path):
    def told(folder, *words):
        return refusal(answer, program, "export-labels", folder, "--to", "cvat", *words)

    assert "is no run folder" in told(tmp_path)
    (tmp_path / "list.txt").write_text("photos/e.jpg\n")
    assert "photos/e.jpg has no pseudo label" in told(run, "--images", tmp_path / "list.txt")
    assert "is there already; move it away" in told(run, "--out", tmp_path)
    assert "is of the run in" in told(run, "--out", run / "2_pseudo_label" / "x")
    for stage in ("2_pseudo_label", "5_relabel"):
        (run / stage / "confidence.csv").unlink()
    assert "has no pseudo labels; stage 2" in told(run)


def test_another_threshold_than_the_runs_is_refused_with_the_way_to_it(run, complaint, answer):
    words = "export-labels", run, "--to", "cvat", "--threshold"
    line = complaint(program, *words, "0.8")
    assert f"the masks of {run} were stored by pseudo_label.threshold=0, without" in line
    assert "--from-stage 2 pseudo_label.threshold=0.8" in line
    assert not (run / "labels_cvat").exists()
    answer(program, *words, "0")
    assert (run / "labels_cvat").is_dir()
