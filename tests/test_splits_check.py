import json

import numpy as np
import pytest
from conftest import SHARED
from PIL import Image

from dataset.lists import read_splits
from dataset.splits import __main__ as program
from dataset.splits.check import audit, table_of
from utils.config.reading import read_config
from utils.errors import UserError

CAMVID = SHARED / "camvid"
UNREADABLE = "files that cannot be read"


def append(path, *lines):
    with path.open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


@pytest.fixture
def rows(tmp_path):
    """Settings of four 10 x 10 labels: cars on 40, 10, 10 and 10 of 100, 100, 50, 100 pixels that
    count, a bus on 10 of the 50, a tram on 1 of the last 100; one unlabeled image, one of val."""
    labels = {
        "a": [[0]] * 6 + [[1]] * 4,
        "b": [[0]] * 9 + [[1]],
        "c": [[1]] + [[2]] + [[0]] * 3 + [[255]] * 5,
        "d": [[1] * 10] + [[0] * 10] * 8 + [[3] + [0] * 9],
        "u": [[9]] * 10,  # no label of ours: nobody may open it
        "v": [[0]] * 10,
    }
    for name, ids in labels.items():
        ids = np.broadcast_to(np.array(ids, np.uint8), (10, 10))
        Image.fromarray(ids).save(tmp_path / f"{name}_ids.png")
        Image.new("RGB", (10, 10)).save(tmp_path / f"{name}.png")
    for name, images in {"labeled": "abcd", "unlabeled": "u", "val": "v"}.items():
        append(tmp_path / f"{name}.txt", *(f"{image}.png {image}_ids.png" for image in images))
    return [
        f"dataset.root={tmp_path}",
        "dataset.kind=custom",
        "dataset.test=null",
        "dataset.classes=[ground,car,bus,tram]",
        "query={min_area: 0.2, exclude: [ground]}",
    ]


def look(rows, *settings) -> dict:
    return audit(read_config("demo.yaml", [*rows, *settings]))


def test_classes_are_counted_by_hand(rows):
    found = look(rows)
    assert found["images"] == {"labeled": 4, "unlabeled": 1, "val": 1}
    assert found["problems"] == []
    classes = map(dict.values, found["classes"])
    assert [(name, round(350 * share), *rest) for name, share, *rest in classes] == [
        ("ground", 269, 4, None),  # excluded: nobody asks for it
        ("car", 70, 4, 2),
        ("bus", 10, 1, 1),  # exactly min_area
        ("tram", 1, 1, 0),
    ]
    assert found["ignored"] == {"labeled": 50 / 400, "val": 0}
    assert (found["unreachable"], found["hardly_reachable"]) == (["tram"], [])


def test_table_and_json_hold_the_same(rows, answer, complaint, tmp_path, tmp_path_factory):
    file = tmp_path_factory.mktemp("out") / "audit.json"
    inside = complaint(program, "check", "--config", "demo.yaml", *rows, "--json", tmp_path / "a")
    assert "--json: " in inside
    assert "would lie where dataset.root is read" in inside
    words = "--config", "demo.yaml", *rows, "--json", file
    assert answer(program, "check", *rows[:2], *words) == [
        "list         images   ignored pixels",
        "labeled           4          12.500%",
        "unlabeled         1",
        "val               1           0.000%",
        "",
        "labeled    pixels  images  with 0.2 of the pixels",
        "ground    76.857%       4  excluded",
        "car       20.000%       4         2",
        "bus        2.857%       1         1",
        "tram       0.286%       1         0",
        "",
        "no query of cisc can reach tram: lower query.min_area?",
        "dataset.labeled: 12.5% of the pixels are ignored, id 255",
        "dataset.val: no image shows 'car' or 'bus' or 'tram'; mIoU counts it only where it is "
        "predicted",
        "nothing found that training would refuse",
    ]
    found = json.loads(file.read_text())
    assert found["classes"][2] == {"name": "bus", "share": 10 / 350, "images": 1, "partners": 1}
    assert found["unreachable"] == ["tram"]
    assert found == json.loads(json.dumps(look(rows)))


def same_image_in_two_lists(root):
    append(root / "val.txt", "a.png a_ids.png", "./b.png b_ids.png")
    return {("labeled, val", "images in both"): 2}


def missing_files(root):
    for name in ("a.png", "b_ids.png", "u.png"):
        (root / name).unlink()
    return {("labeled", UNREADABLE): 2, ("unlabeled", UNREADABLE): 1}


def unreadable_files(root):
    for name in ("a.png", "b_ids.png", "v_ids.png"):
        (root / name).write_text("no picture")
    return {("labeled", UNREADABLE): 2, ("val", UNREADABLE): 1}


def wrong_ids(root):
    ids = np.array([[4, 9], [0, 255]], np.uint8).repeat(5, axis=0).repeat(5, axis=1)
    Image.fromarray(ids).save(root / "a_ids.png")
    Image.new("L", (10, 10), 7).save(root / "d_ids.png")
    return {("labeled", "ids without a meaning"): 3}


def sizes_that_differ(root):
    Image.new("RGB", (10, 9)).save(root / "a.png")
    Image.new("L", (9, 10), 200).save(root / "b_ids.png")
    return {("labeled", "sizes that differ"): 2, ("labeled", "ids without a meaning"): 1}


def lines_without_a_mask(root):
    (root / "labeled.txt").write_text("a.png\nb.png\nc.png c_ids.png")
    return {("labeled", "lines without a mask"): 2}


def nothing_that_counts(root):
    Image.new("L", (10, 10), 255).save(root / "v_ids.png")
    return {("val", "list without a pixel that counts"): 1}


@pytest.mark.parametrize(
    "spoil",
    [
        same_image_in_two_lists,
        missing_files,
        unreadable_files,
        wrong_ids,
        sizes_that_differ,
        lines_without_a_mask,
        nothing_that_counts,
    ],
)
def test_everything_that_training_refuses_is_found_and_counted(rows, spoil, tmp_path, complaint):
    expected = spoil(tmp_path)
    problems = look(rows)["problems"]
    assert {(each["where"], each["what"]): each["count"] for each in problems} == expected
    with pytest.raises(UserError):
        read_splits(read_config("demo.yaml", rows).dataset)
    line = complaint(program, "check", "--config", "demo.yaml", *rows)
    assert problems[0]["example"] in line


def test_pictures_that_end_early_are_found_though_training_would_begin(rows, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 10, 3), np.uint8))
    for name in ("a.png", "u.png"):
        noise.save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:200])
    problems = look(rows)["problems"]
    found = {(each["where"], each["what"]): each["count"] for each in problems}
    assert found == {("labeled", UNREADABLE): 1, ("unlabeled", UNREADABLE): 1}
    read_splits(read_config("demo.yaml", rows).dataset)  # reads the headers of images alone


def test_all_problems_are_in_the_table_and_the_first_is_the_line(rows, tmp_path, complaint):
    missing_files(tmp_path)
    told = "no such file; correct the list or dataset.root"
    assert list(table_of(look(rows)))[-2:] == [
        f"labeled: 2 files that cannot be read: {tmp_path}/a.png: {told}",
        f"unlabeled: 1 files that cannot be read: {tmp_path}/u.png: {told}",
    ]
    line = complaint(program, "check", "--config", "demo.yaml", *rows)
    assert line == f"error: {tmp_path}/a.png: {told} (2 sorts of problems are listed above)"


def test_five_classes_of_camvid_are_out_of_reach_at_pascals_min_area():
    if not CAMVID.is_dir():
        pytest.skip("needs the CamVid set in ../shared/camvid")
    lists = [f"dataset.{name}=1_8/{name}.txt" for name in ("labeled", "unlabeled")]
    config = read_config("camvid.yaml", [f"dataset.root={CAMVID}", "query.min_area=0.03", *lists])
    found = audit(config)
    assert found["problems"] == []
    assert found["unreachable"] == ["pedestrian", "bicyclist"]
    assert found["hardly_reachable"] == ["pole", "sign", "fence"]


def test_what_leaves_nothing_to_look_at(rows, complaint, tmp_path):
    for setting, told in {
        f"dataset.root={tmp_path}/gone": "gone is not a folder",
        "dataset.val=gone.txt": "dataset.val: gone.txt is not in",
        "query.exclude=[sky]": "query.exclude: 'sky' is no class",
    }.items():
        assert told in complaint(program, "check", "--config", "demo.yaml", *rows, setting)


def test_every_list_that_cannot_be_read_is_reported(rows, tmp_path):
    (tmp_path / "labeled.txt").write_text("a.png a_ids.png\na.png a_ids.png\n")
    (tmp_path / "val.txt").unlink()
    found = look(rows)
    problems = {(each["where"], each["what"]) for each in found["problems"]}
    assert problems == {(name, "lists that cannot be read") for name in ("labeled", "val")}
    assert found["images"] == {"labeled": 0, "unlabeled": 1, "val": 0}
