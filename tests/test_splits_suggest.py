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
from dataset.splits.suggest import Look, doubt_of, features_of, suggest
from utils.files import write_csv


def test_doubt_in_rare_classes_comes_first_by_hand():
    doubt = np.array([[0.4, 0.0], [0.1, 0.3], [0.0, 0.2]])
    features, known = np.array([[1.0, 0], [0, 1.0], [0, -1.0]]), np.zeros((1, 2))
    rows = suggest(doubt, np.array([0.1, 1.0]), features, known, 3)
    assert [each.row for each in rows] == [1, 2, 0]
    assert [each.score for each in rows] == pytest.approx([0.31, 0.2, 0.04])
    assert [each.distance for each in rows] == [1, 1, 1]


def test_images_alike_are_not_suggested_one_after_another():
    """The second best is like the best, and comes after one that is unlike both."""
    doubt, features = np.array([[0.5], [0.49], [0.2]]), np.array([[5.0], [5.1], [-4.0]])
    rows = suggest(doubt, np.ones(1), features, np.zeros((1, 1)), 3)
    assert [each.row for each in rows] == [0, 2, 1]
    assert rows[2].distance == pytest.approx(0.1)
    labeled = suggest(doubt, np.ones(1), features, np.array([[5.05]]), 1)
    assert labeled[0].row == 2


def test_ties_go_by_order_and_all_can_be_suggested():
    rows = suggest(np.zeros((3, 2)), np.ones(2), np.zeros((3, 1)), np.zeros((1, 1)), 3)
    assert [each.row for each in rows] == [0, 1, 2]


def test_doubt_is_spread_over_the_classes_that_are_stored():
    shares = np.array([[0.25, 0.0, 0.25, 0.5], [0, 0, 0, 1.0]])
    doubt = doubt_of(shares, np.array([0.6, 0.4]))
    assert doubt == pytest.approx(np.array([[0.2, 0, 0.2], [0.2, 0.2, 0.2]]))


def test_pictures_and_labels_count_the_same():
    rng = np.random.default_rng(0)
    looks = [Look(rng.random((n, 48)), rng.dirichlet([1, 1, 1], n)) for n in (3, 5)]
    rows = np.concatenate(features_of(*looks))
    assert rows.shape == (8, 51)
    parts = rows[:, :48].var(axis=0).sum(), rows[:, 48:].var(axis=0).sum()
    assert parts == pytest.approx((1, 1))


@pytest.fixture
def run(tmp_path, demo_root):
    """A run folder on the demo set: true masks are its pseudo labels, and two are doubtful."""
    folder = tmp_path / "out" / "mine"
    folder.mkdir(parents=True)
    dataset = {"kind": "demo", "root": str(demo_root)}
    config = {"name": "mine", "dataset": dataset, "augment": {"base_size": 64, "crop_size": 48}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    truth = read_list(demo_root / "truth.txt", demo_root, None)
    names = [sample.name for sample in truth]
    for sample in truth:
        mask = mask_file(folder / "2_pseudo_label" / "masks", sample)
        mask.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sample.mask, mask)
    doubtful = {names[3]: 0.5, names[7]: 0.6}
    rows = [(name, doubtful.get(name, 0.999)) for name in names]
    write_csv(folder / "2_pseudo_label/confidence.csv", ("image", "confidence"), rows)
    return folder, list(doubtful)


def test_suggestions_of_a_run(run, answer, demo_root):
    folder, doubtful = run
    said = answer(program, "suggest", folder, "--count", "2")
    listed = read_list(folder / "suggested/list.txt", demo_root, None)
    assert sorted(sample.name for sample in listed) == doubtful
    assert said[0].endswith("list.txt, images.csv and sheet.png of 2 of 10 images")
    assert ": mean probability 0." in said[1]
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
    (folder / "2_pseudo_label/confidence.csv").unlink()
    assert "has no pseudo labels" in refusal(answer, program, "suggest", folder)
