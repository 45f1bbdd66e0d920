from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.catalog import KINDS
from dataset.demo import __main__ as program
from dataset.demo.objects import CLASSES
from dataset.demo.scene import draw_scene
from dataset.demo.writing import Scenes, write_demo
from dataset.query import QueryRule
from utils.config.schema import QuerySection
from utils.errors import UserError
from utils.files import sha256

PALETTE = KINDS["demo"].palette()
SMALL = Scenes(train=4, labeled=2, val=2, test=2, size=(48, 64))


def digest(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(file.relative_to(root)): sha256(file) for file in files}


def test_same_seed_same_bytes_and_other_seed_other_images(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_demo(tmp_path / name, PALETTE, SMALL._replace(seed=seed))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    changed = {k for k, v in digest(tmp_path / "a").items() if digest(tmp_path / "c")[k] != v}
    assert {f"JPEGImages/0{i:03}.jpg" for i in range(4)} <= changed


def test_more_images_leave_the_others_as_they_are(tmp_path):
    write_demo(tmp_path / "few", PALETTE, SMALL)
    write_demo(tmp_path / "more", PALETTE, SMALL._replace(train=6, val=3))
    few, more = digest(tmp_path / "few"), digest(tmp_path / "more")
    pictures = [name for name in few if "/" in name]
    assert pictures
    assert all(few[name] == more[name] for name in pictures)


def test_finished_set_is_left_alone_and_a_killed_one_drawn_again(tmp_path):
    write_demo(tmp_path, PALETTE, SMALL)
    whole, picture = digest(tmp_path), tmp_path / "JPEGImages" / "0001.jpg"
    picture.write_bytes(b"touched")
    write_demo(tmp_path, PALETTE, SMALL)
    assert picture.read_bytes() == b"touched"
    (tmp_path / "demo.json").write_text("{}\n")  # as drawing begins
    with pytest.raises(UserError, match=r"0001\.jpg: is there with other content"):
        write_demo(tmp_path, PALETTE, SMALL)
    picture.unlink()
    write_demo(tmp_path, PALETTE, SMALL)
    assert digest(tmp_path) == whole


@pytest.mark.parametrize("name", ["JPEGImages/a.jpg", "SegmentationClass/0000.png", "demo.json"])
def test_another_data_set_is_left_alone(tmp_path, name):
    theirs = tmp_path / name
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"another data set, .*; name an empty one"):
        write_demo(tmp_path, PALETTE, SMALL)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [theirs]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["file/set"], "file/set: cannot write this file"),
        (["set", "--seed", "-1"], "--seed: -1 is"),
    ],
)
def test_a_command_that_cannot_draw_says_why(tmp_path, monkeypatch, complaint, words, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert complaint(program, *words).startswith(f"error: {told}")


def test_set_passes_the_checks_of_a_run_and_unlabeled_images_have_no_mask_file(splits, demo_root):
    assert [len(part) for part in splits] == [6, 10, 4, 0]  # dataset.test names none
    unlabeled = [f"JPEGImages/{number:04}.jpg" for number in range(6, 16)]
    assert (demo_root / "unlabeled.txt").read_text().split() == unlabeled
    masks = {sample.mask for sample in splits.labeled + splits.val}
    tests = {demo_root / f"SegmentationClass/200{number}.png" for number in range(4)}
    assert {*(demo_root / "SegmentationClass").iterdir()} == masks | tests
    with Image.open(splits.labeled[0].mask) as mask:
        assert mask.mode == "P"


@pytest.mark.parametrize("label", range(1, len(CLASSES)))
def test_first_class_is_drawn_and_usually_large_enough_to_be_queried(label):
    rule = QueryRule.of(QuerySection(), KINDS["demo"])
    shown = 0
    for number in range(12):
        image, ids = draw_scene(np.random.default_rng(number), first=label)
        assert image.shape == (96, 128, 3)
        assert image.dtype == ids.dtype == np.uint8
        assert set(np.unique(ids)) <= {*range(len(CLASSES)), 255}
        assert (ids == 0).mean() < 0.8
        shown += label in rule.classes_in(Image.fromarray(ids))
    assert shown >= 9
