"""Run folders that someone spoilt, as the report and the diagnosis read them."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from conftest import refusal
from PIL import Image

import eval as eval_program
import utils.report.__main__ as report_program
from dataset.catalog import KINDS
from dataset.lists import read_splits
from model.cisc.anchors import read_selection
from utils.config.reading import read_config
from utils.config.schema import DatasetSection
from utils.panels import save_mask
from utils.report.page import page
from utils.report.reading import read_run
from utils.run.folder import is_run_folder, read_votes, run_of

CLASSES = KINDS["demo"].classes
WEIGHT = {"auroc": None, "calibration_error": 0.1, "weight_on_wrong": 0.2, "curve": []}
DIAGNOSIS = {
    "labels": {"2_pseudo_label": {"images": 1, "share": 0.9, "miou": None, "pixel_accuracy": 1}},
    "classes": {"teacher": {"miou": 0.5}},
    "weights": {"confidence": WEIGHT, "ones": WEIGHT},
    "rank_correlation": None,
}
AGAIN = "delete the run's folder val"


@pytest.fixture
def run(demo_root, tmp_path, demo_overrides):
    """What a run of stages 1, 2, 3 and 6 leaves, made by hand of one validation image."""
    folder = tmp_path / "outdir" / "demo"
    config = read_config("demo.yaml", [*demo_overrides, "retrain.weight=ones"])
    for name in ("1_supervised", "2_pseudo_label", "3_select", "6_retrain"):
        (folder / name).mkdir(parents=True)
        report = {"seconds": 1.5, "files": {}}
        report |= {"miou": 0.5, "iterations": 2} if name[0] in "16" else {}
        (folder / name / "stage.json").write_text(json.dumps(report))
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (folder / "environment.json").write_text("{}")
    (folder / "diagnosis.json").write_text(json.dumps(DIAGNOSIS))
    lines = [{"stage": name, "epoch": 1, "ce": 0.5} for name in ("1_supervised", "6_retrain")]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    scores = "image,reliability\nJPEGImages/0006.jpg,1.5\nJPEGImages/0007.jpg,-inf\n"
    (folder / "3_select" / "unlabeled_scores.csv").write_text(scores)
    (folder / "3_select" / "reliable.txt").write_text("JPEGImages/0006.jpg\n")
    (folder / "3_select" / "unreliable.txt").write_text("JPEGImages/0007.jpg\n")
    (folder / "3_select" / "query_index.json").write_text("{}")
    ids = np.zeros((48, 64), np.uint8)
    save_mask(folder / "val/labels/JPEGImages/1000.png", ids, KINDS["demo"].palette())
    counts = np.eye(len(CLASSES), dtype=int)
    rows = [",".join(map(str, (name, *row))) for name, row in zip(CLASSES, counts, strict=True)]
    picture = demo_root / "JPEGImages/1000.jpg"
    for number, name in enumerate(("1_supervised", "6_retrain")):
        place = folder / "val" / name
        save_mask(place / "masks/JPEGImages/1000.png", ids, KINDS["demo"].palette())
        (place / "confusion.csv").write_text("\n".join([",".join(["class", *CLASSES]), *rows]))
        (place / "images.csv").write_text(
            "image,miou,pixel_accuracy,picture,label\n"
            f"JPEGImages/1000.jpg,{(0.75, 0.5)[number]},1,{picture},labels/JPEGImages/1000.png\n"
        )
    return folder


def text(name, content):
    return lambda run: (run / name).write_text(content)


def edit(name, old, new):
    def spoil(run):
        content = (run / name).read_text()
        assert old in content
        (run / name).write_text(content.replace(old, new))

    return spoil


def garbage(name):
    return lambda run: (run / name).write_bytes(b"\xff\x00\n\x89PNG")


def gone(name):
    return lambda run: (run / name).unlink()


def picture(name, size=(8, 8), mode="L"):
    return lambda run: Image.new(mode, size).save(run / name)


def folder_there(name):
    def spoil(run):
        (run / name).unlink()
        (run / name).mkdir()

    return spoil


LAST, SCORES = "val/6_retrain", "3_select/unlabeled_scores.csv"
MASK, LABEL = f"{LAST}/masks/JPEGImages/1000.png", "val/labels/JPEGImages/1000.png"


def test_the_learning_curve_of_a_run_that_went_on(run, tmp_path):
    assert "How much do more labels help?" not in page([read_run(run)])
    (run / "rounds").mkdir()
    shutil.copytree(run, tmp_path / "ended", ignore=shutil.ignore_patterns("rounds"))
    (tmp_path / "ended").rename(run / "rounds/1")
    for folder, labeled, miou in ((run / "rounds/1", 6, 0.4), (run, 12, 0.5)):
        for stage in ("1_supervised", "6_retrain"):
            file = folder / stage / "stage.json"
            more = {"labeled_images": labeled} if stage[0] == "1" else {"miou": miou}
            file.write_text(json.dumps({**json.loads(file.read_text()), **more}))
    (mask,) = (run / LAST / "masks").rglob("*.png")
    ids = np.zeros((48, 64), np.uint8)
    ids[:24] = 1  # half of the ground is taken for the next class: IoU 0.5 and 0
    save_mask(mask, ids, KINDS["demo"].palette())
    content = page([read_run(run)])
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", content))
    assert "How much do more labels help?" in words
    assert "demo 1 6 6_retrain 40.0 100.0 to 100.0" in words  # one image: no other resample
    assert "demo 2 12 6_retrain 50.0 25.0 to 25.0" in words
    mask.unlink()
    content = page([read_run(run), read_run(run / "rounds/1")])
    assert "not known" in content


def test_the_page_of_an_undamaged_folder(run):
    content = page([read_run(run)])
    assert content.count("<img") == 4  # of the image that fell, at both stages
    assert "1 of 2 unlabeled images have no score" in content
    assert "reliable (1)" in content
    (run / SCORES).write_text("image,reliability\na,-inf\nb,-inf\n")
    content = page([read_run(run)])
    assert "2 of 2 unlabeled images have no score" in content
    assert "reliable (" not in content


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (gone("config.yaml"), "demo: is no run folder"),
        (text("config.yaml", "- 1"), "config.yaml: holds no 'key: value' lines"),
        (garbage("6_retrain/stage.json"), "stage.json: holds no JSON"),
        (text("6_retrain/stage.json", "[]"), "stage.json: holds no JSON object; restore it, or do"),
        (text("6_retrain/stage.json", '{"miou": "0.5"}'), "stage.json: miou: Input should be a v"),
        (text("6_retrain/stage.json", '{"miou": 5}'), "stage.json: miou: Input should be less"),
        (text("6_retrain/stage.json", '{"miou": 0.5, "seconds": []}'), "stage.json: seconds: "),
        (text("6_retrain/stage.json", '{"miou": 0.5, "iterations": 0}'), "iterations: Input"),
        (folder_there("6_retrain/stage.json"), "6_retrain/stage.json: holds no JSON"),
        (text("environment.json", "[1]"), "environment.json: holds no JSON object; restore"),
        (text("diagnosis.json", "3"), "diagnosis.json: holds no JSON object; make it again"),
        (edit("diagnosis.json", '"weights"', '"other"'), "diagnosis.json: weights: Field requ"),
        (edit("diagnosis.json", "0.9", "[]"), "diagnosis.json: labels.2_pseudo_label.share: "),
        (gone(f"{LAST}/confusion.csv"), "confusion.csv: cannot read this file (No such file"),
        (
            text(f"{LAST}/confusion.csv", ""),
            f"confusion.csv: cannot read this file (no table); {AGAIN}",
        ),
        (garbage(f"{LAST}/confusion.csv"), "confusion.csv: cannot read this file"),
        (text(f"{LAST}/confusion.csv", "a,b\n1,2\n"), "holds no counts of classes by classes"),
        (edit(f"{LAST}/confusion.csv", "0,1", "0"), "confusion.csv:3: has not 8 cells"),
        (edit(f"{LAST}/confusion.csv", "0,1", "0,-1"), "holds no counts"),
        (edit(f"{LAST}/confusion.csv", "0,1", f"0,{10**30}"), "holds no counts"),
        (edit(f"{LAST}/confusion.csv", "0,1", "0,nan"), "holds no counts"),
        (edit(f"{LAST}/confusion.csv", "mug", "cup"), "have other classes or images"),
        (gone(f"{LAST}/images.csv"), "images.csv: cannot read this file (No such file"),
        (text(f"{LAST}/images.csv", ""), "images.csv: cannot read this file"),
        (text(f"{LAST}/images.csv", "x,y\n1,2\n"), "images.csv: its columns are not image, miou"),
        (edit(f"{LAST}/images.csv", ",1,", ","), "images.csv:2: has not 5 cells"),
        (edit(f"{LAST}/images.csv", "0.5", "half"), "images.csv: 'half' is no such number"),
        (edit(f"{LAST}/images.csv", "0.5", "nan"), "images.csv: 'nan' is no such number"),
        (edit(f"{LAST}/images.csv", "labels/", "../../"), "leads out of its folder"),
        (edit(f"{LAST}/images.csv", "1000.jpg,", "1001.jpg,"), "have other classes or images"),
        (gone(SCORES), "unlabeled_scores.csv: cannot read this file (No such file"),
        (garbage(SCORES), "unlabeled_scores.csv: cannot read this file"),
        (text(SCORES, "image\na\n"), "its columns are not image, reliability; restore it"),
        (edit(SCORES, "1.5", "nan"), "unlabeled_scores.csv: 'nan' is no such number"),
        (gone("3_select/reliable.txt"), "reliable.txt: cannot read this list"),
        (garbage("3_select/reliable.txt"), "reliable.txt: cannot read this list"),
        (garbage(MASK), "1000.png: cannot read this picture"),
        (picture(MASK), "1000.png: is no mask of its image"),
        (picture(MASK, mode="P"), "1000.png: is no mask of its image"),  # another size
        (picture(LABEL, mode="P"), "1000.png: is no mask of its image"),
        (picture(LABEL, (64, 48), "RGB"), "labels/JPEGImages/1000.png: is no mask"),
    ],
)
def test_damage_earns_a_line(run, spoil, told):
    spoil(run)
    assert told in refusal(lambda: page([read_run(run)]))


def test_lines_of_metrics_that_are_none_are_left_out(run):
    metrics = run / "metrics.jsonl"
    expected = page([read_run(run)])
    more = [{"stage": []}, {"stage": "6_retrain", "epoch": 0, "ce": 9}, [1], {"epoch": 2}]
    more += [{"stage": "6_retrain", "epoch": 1, "ce": float("nan"), "lr": 10**400, "miou": "x"}]
    with metrics.open("a") as file:
        file.writelines(f"\n{json.dumps(each)}" for each in more)
    with metrics.open("ab") as file:
        file.write(b"\n\xff{")
    assert page([read_run(run)]) == expected


def test_pictures_outside_the_data_root_are_not_shown(run, tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "1000.jpg")
    table = run / LAST / "images.csv"
    kept = table.read_text().splitlines()
    (line,) = kept[1:]
    name, miou, accuracy, _, label = line.split(",")
    table.write_text("\n".join([kept[0], f"{name},{miou},{accuracy},{tmp_path}/1000.jpg,{label}"]))
    content = page([read_run(run)])
    assert "not shown: the picture is not in dataset.root" in content
    assert "<img" not in content
    table.write_text("\n".join(kept))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["dataset"]["root"] = f"../{config['dataset']['root'].rsplit('/')[-1]}"
    (run / "config.yaml").write_text(yaml.safe_dump(config))  # of a run started elsewhere
    assert page([read_run(run)]).count("<img") == 4


def test_missing_masks_are_told(run):
    (run / MASK).unlink()
    assert "not shown: the picture or a mask of it is gone" in page([read_run(run)])


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (gone("config.yaml"), "demo: is no run folder (it has no config.yaml)"),
        (text("config.yaml", "sead: 1"), "config.yaml: unknown key 'sead'"),
        (lambda run: shutil.rmtree(run), "demo: is no run folder"),
        (picture("2_pseudo_label/0006.png"), "1_supervised/checkpoint.pth: no such checkpoint"),
        (picture("2_pseudo_label/masks/JPEGImages/0006.png"), "0006.png: is no mask of its image"),
        (garbage("2_pseudo_label/masks/JPEGImages/0006.png"), "0006.png: cannot read this picture"),
    ],
)
def test_damage_earns_a_line_of_the_diagnosis(complaint, run, demo_root, spoil, told):
    (run / "2_pseudo_label/masks/JPEGImages").mkdir(parents=True)
    spoil(run)
    assert told in complaint(eval_program, run, "--diagnose", demo_root / "truth.txt")


@pytest.mark.parametrize(
    "spoil",
    [
        gone("3_select/reliable.txt"),
        garbage("3_select/reliable.txt"),
        text("3_select/unreliable.txt", "no.jpg"),
        text("3_select/query_index.json", "[]"),
        text("3_select/query_index.json", '{"cat": []}'),
        text("3_select/query_index.json", '{"mug": 3}'),
    ],
)
def test_a_damaged_selection_is_told(run, demo_root, spoil):
    unlabeled = read_splits(DatasetSection(kind="demo", root=str(demo_root))).unlabeled
    assert read_selection(run / "3_select", unlabeled, CLASSES).index == {}
    spoil(run)
    line = refusal(read_selection, run / "3_select", unlabeled, CLASSES)
    assert "3_select: the selection is damaged" in line
    assert "--from-stage 3" in line


def test_what_is_no_run_folder_is_told_before_where_its_page_would_go(complaint, run):
    line = complaint(report_program, run / "6_retrain")
    assert "6_retrain: is no run folder" in line


def test_votes_that_are_gone_say_which_stage_makes_them(tmp_path):
    line = refusal(read_votes, tmp_path / "2_votes")
    assert line.startswith(f"{tmp_path / '2_votes' / 'votes.json'}: no such file; ")
    assert line.endswith("with --from-stage 2")


def test_what_is_of_a_run(run):
    assert is_run_folder(run)
    assert not is_run_folder(run.parent)
    assert run_of(run / "6_retrain" / "new" / "x.png") == run
    assert run_of(run / "results.json") == run
    assert run_of(run / "mine.json") is None
    assert run_of(run) is None
