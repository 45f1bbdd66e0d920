"""Which unlabeled images to label next."""

import csv
import shutil

import numpy as np
import pytest
import yaml
from conftest import refusal
from PIL import Image

from dataset.catalog import KINDS
from dataset.lists import mask_file, read_list
from dataset.splits import __main__ as program
from dataset.splits.suggest import count_images, suggest
from utils.files import write_csv, write_json

GIVEN = ("suggest", "--count", "1")


def test_doubt_in_rare_classes_comes_first_by_hand():
    """Images that resemble no other: each explains its own doubt alone."""
    doubt, axes = np.array([[0.4, 0.0], [0.1, 0.3], [0.0, 0.2]]), np.eye(3)
    rows = suggest(doubt, np.array([0.1, 1.0]), axes, np.empty((0, 3)), 3)
    assert [each.row for each in rows] == [1, 2, 0]
    assert [each.gain for each in rows] == pytest.approx([0.31, 0.2, 0.04])
    assert [each.label for each in rows] == [1, 1, 0]
    assert [each.like for each in rows] == [1, 1, 1]


def test_images_that_resemble_labeled_or_suggested_ones_come_later():
    """Two pairs that look alike, one of them with a labeled image among it."""
    features = np.array([[1.0, 0], [1, 0], [-1, 0], [-1, 0], [0, 1], [0, -1]])
    doubt = np.array([[0.9], [0.9], [0.5], [0.49], [0.3], [0.2]])
    none = np.empty((0, 2))
    rows = suggest(doubt, np.ones(1), features, none, 4)
    assert [each.row for each in rows] == [0, 2, 4, 5]
    assert rows[0].gain == pytest.approx(1.8)  # both of the pair
    assert [each.like for each in rows] == [2, 2, 1, 1]
    rows = suggest(doubt, np.ones(1), features, np.array([[2.0, 0.0]]), 2)
    assert [each.row for each in rows] == [2, 4]


def test_ties_go_by_order_and_all_can_be_suggested():
    rows = suggest(np.zeros((3, 2)), np.ones(2), np.ones((3, 4)), np.ones((1, 4)), 3)
    assert [each.row for each in rows] == [0, 1, 2]


def test_fewer_suggestions_are_the_first_of_more():
    rng = np.random.default_rng(0)
    doubt, features = rng.random((30, 3)), rng.normal(size=(30, 5))
    rows = suggest(doubt, np.ones(3), features, features[:2], 20)
    fewer = suggest(doubt, np.ones(3), features, features[:2], 10)
    assert [each[:3] for each in fewer] == [each[:3] for each in rows[:10]]


@pytest.fixture
def run(tmp_path, demo_root):
    """A run folder on the demo set: true masks are its pseudo labels.

    On two of them teacher and votes disagree most: on mug, and on ball.
    """
    folder = tmp_path / "out" / "mine"
    folder.mkdir(parents=True)
    dataset = {"kind": "demo", "root": str(demo_root)}
    config = {"name": "mine", "dataset": dataset, "augment": {"base_size": 64, "crop_size": 48}}
    config["method"] = "cisc_patch"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    truth = read_list(demo_root / "truth.txt", demo_root, None)
    names = [sample.name for sample in truth]
    for sample in truth:
        mask = mask_file(folder / "2_pseudo_label" / "masks", sample)
        mask.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sample.mask, mask)
    stage, classes = folder / "2_pseudo_label", KINDS["demo"].classes
    write_json(folder / "2_votes" / "votes.json", {"factor": 1.0, "teacher": 1.0, "votes": 1.0})
    doubts = {names[3]: ("mug", 0.31), names[7]: ("ball", 0.4)}
    rows = []
    for name in names:
        label, value = doubts.get(name, ("ground", 0.02))
        rows.append((name, *(value if label == each else 0.001 for each in classes)))
    write_csv(stage / "confidence.csv", ("image", "confidence"), [(name, 0.9) for name in names])
    write_csv(stage / "doubt.csv", ("image", *classes), rows)
    labeled = [sample.name for sample in read_list(demo_root / "labeled.txt", demo_root, None)]
    seen = [*names, *labeled]
    features = np.random.default_rng(0).normal(size=(len(seen), 40)).astype(np.float16)
    np.savez(stage / "features.npz", images=np.array(seen), features=features)
    return folder, list(doubts)


def test_suggestions_of_a_run(run, answer, demo_root):
    folder, doubtful = run
    said = answer(program, "suggest", folder, "--count", "2")
    listed = read_list(folder / "suggested/list.txt", demo_root, None)
    assert sorted(sample.name for sample in listed) == doubtful
    assert said[0].endswith("list.txt, images.csv and sheet.png of 2 of 10 images")
    known = [*map(str, count_images(read_list(demo_root / "labeled.txt", demo_root, None), 7))]
    mug, ball = (KINDS["demo"].classes.index(name) for name in ("mug", "ball"))
    words = sorted(line.partition("; ")[0] for line in said[1:3])
    assert words == [
        f"{doubtful[0]}: teacher and votes disagree on 'mug' (0.31), in {known[mug]} of 6 "
        "labeled images",
        f"{doubtful[1]}: teacher and votes disagree on 'ball' (0.40), in {known[ball]} of 6 "
        "labeled images",
    ]
    assert all(line.endswith(" of 10 images are most like it") for line in said[1:3])
    assert said[-1].split()[-1] == str(folder / "suggested/list.txt")
    with (folder / "suggested/images.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["image"] for row in table] == [sample.name for sample in listed]
    assert {row["class"] for row in table} <= set(KINDS["demo"].classes)
    with Image.open(folder / "suggested/sheet.png") as sheet:
        assert sheet.width > sheet.height / 3
    assert answer(program, "suggest", folder, "--count", "2") == said  # the same again
    told = refusal(answer, program, "suggest", folder, "--count", "3")
    assert "list.txt: is there with other lines" in told
    answer(program, "suggest", folder, "--count", "10", "--out", folder / "all")


def test_where_votes_do_not_help_the_teacher_alone_is_in_doubt(run, answer):
    folder, _ = run
    write_json(folder / "2_votes" / "votes.json", {"factor": 1.0, "teacher": 1.0, "votes": 0.0})
    said = answer(program, *GIVEN, folder)
    assert ": the teacher is unsure of 'mug' (0.31), in " in said[1]


def test_images_that_have_a_label_by_now_are_left_out(run, answer, demo_root, tmp_path):
    folder, (first, second) = run
    config = yaml.safe_load((folder / "config.yaml").read_text())
    longer = tmp_path / "longer.txt"
    truth = (demo_root / "truth.txt").read_text().splitlines()
    line = next(line for line in truth if line.startswith(first))
    longer.write_text((demo_root / "labeled.txt").read_text() + line)
    config["dataset"]["labeled"] = str(longer)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    answer(program, "suggest", folder, "--count", "1")
    assert (folder / "suggested/list.txt").read_text() == f"{second}\n"


def test_suggestions_that_cannot_be(run, answer, tmp_path):
    folder, _ = run
    assert "--count: 11 is not from 1 to 10" in refusal(
        answer, program, "suggest", folder, "--count", "11"
    )
    assert "is no run folder" in refusal(answer, program, "suggest", tmp_path)
    assert "seed=1: suggest takes no settings" in refusal(
        answer, program, "suggest", folder, "seed=1"
    )
    (tmp_path / "sheet.png").write_text("another program's")
    for out, told in (
        (tmp_path, f"{tmp_path / 'sheet.png'}: is there already; move it away, or name another"),
        (folder / "2_pseudo_label", "is of the run in"),  # its tables are not written over
    ):
        line = refusal(answer, program, *GIVEN, folder, "--out", out)
        assert told in line
    assert (tmp_path / "sheet.png").read_text() == "another program's"
    place = folder / "2_pseudo_label"
    with np.load(place / "features.npz") as found:
        names, features = found["images"], found["features"]
    np.savez(place / "features.npz", images=names[:10], features=features[:10])
    line = refusal(answer, program, *GIVEN, folder)
    assert (
        "features.npz: has not all images, or none of the labeled ones; do the stage and later ones"
        in line
    )
    (place / "features.npz").write_bytes(b"PK garbage")
    line = refusal(answer, program, *GIVEN, folder)
    assert "features.npz: holds no features of its images" in line
    (place / "doubt.csv").unlink()
    line = refusal(answer, program, *GIVEN, folder)
    assert "doubt.csv: no such file; runs of earlier versions have none" in line
    assert "--from-stage 2, in a copy of" in line
    (place / "confidence.csv").unlink()
    assert "has no pseudo labels" in refusal(answer, program, *GIVEN, folder)
