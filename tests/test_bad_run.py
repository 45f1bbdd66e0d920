"""Run folders that someone spoilt, and command lines that make no sense: each earns a line."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import eval as eval_program
import train as train_program
from utils.errors import UserError


@pytest.fixture
def run(demo_overrides, tmp_path, monkeypatch) -> Path:
    """A run that did stages 1 and 2, and fails in stage 3; what stages do is a stub."""

    def train_supervised(stage, *_):
        torch.save({"model": {}}, stage.folder / "checkpoint.pth")
        stage.record(1, {"ce": 0.5})
        return {"miou": 0.5, "per_class_iou": {}}

    def fit_votes(stage, *_):
        (stage.folder / "votes.json").write_text('{"factor": 1.0, "teacher": 1.0, "votes": 0.0}')
        return {}

    def write_pseudo_labels(stage, *_):
        (stage.folder / "masks").mkdir(exist_ok=True)
        for name in "abcd":
            (stage.folder / "masks" / f"{name}.png").write_text(name)
        return {"images": 4}

    def select(stage, *_):
        raise UserError("as far as this goes")

    for stub in (train_supervised, fit_votes, write_pseudo_labels, select):
        monkeypatch.setattr(train_program, stub.__name__, stub)
    return tmp_path / "outdir" / "demo"


@pytest.fixture
def train(complaint, demo_overrides, run):
    """``train.py --config demo.yaml`` on that run."""
    return lambda *words: complaint(train_program, "--config", "demo.yaml", *demo_overrides, *words)


def garbage(name):
    return lambda run: (run / name).write_bytes(b"\xff\x00 garbage")


def text(name, content):
    return lambda run: (run / name).write_text(content)


def gone(name):
    return lambda run: (run / name).unlink()


def folder_for_a_file(name):
    def spoil(run):
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()

    return spoil


def file_for_a_folder(name):
    def spoil(run):
        shutil.rmtree(run / name)
        (run / name).write_text("")

    return spoil


def half(name):
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:-9])


DEMO = ["--config", "demo.yaml"]
AGAIN_1 = "--from-stage 1"
AGAIN_2 = "--from-stage 2"
CHANGED = (
    "1_supervised/checkpoint.pth: changed or gone since 1_supervised ended; restore, or do the "
    f"stage and later ones again with {AGAIN_1}"
)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (garbage("config.yaml"), ["demo/config.yaml: not YAML", "restore this file", AGAIN_1]),
        (text("config.yaml", "- 1"), ["demo/config.yaml: holds no 'key: value' lines", AGAIN_1]),
        (text("config.yaml", "sead: 1"), ["demo/config.yaml: unknown key 'sead'", AGAIN_1]),
        (gone("config.yaml"), ["demo/config.yaml: no such file", "restore this", AGAIN_1]),
        (folder_for_a_file("config.yaml"), ["demo/config.yaml: no such file", AGAIN_1]),
        (garbage("lists.json"), ["demo/lists.json: holds no JSON object; restore", AGAIN_1]),
        (text("lists.json", "[]"), ["demo/lists.json: holds no JSON object; restore", AGAIN_1]),
        (gone("lists.json"), ["demo/lists.json: no such file", "restore this", AGAIN_1]),
        (text("lists.json", '{"val": "0"}'), ["its stages used another list dataset.l", AGAIN_1]),
        (garbage("environment.json"), ["demo/environment.json: holds no JSON object", AGAIN_1]),
        (text("environment.json", "[]"), ["demo/environment.json: holds no JSON object", AGAIN_1]),
        (gone("environment.json"), ["demo/environment.json: no such file", AGAIN_1]),
        (folder_for_a_file("lock"), ["demo/lock: cannot write this file (Is a directory)"]),
        (garbage("1_supervised/stage.json"), ["1_supervised/stage.json: holds no JSON"]),
        (text("1_supervised/stage.json", "3"), ["stage.json: is no report of a stage", AGAIN_1]),
        (gone("2_votes/votes.json"), ["2_votes/votes.json: changed or gone", AGAIN_2]),
        (text("2_pseudo_label/stage.json", "{}"), ["is no report of a stage", AGAIN_2]),
        (text("1_supervised/stage.json", '{"files": {"checkpoint.pth": "0f"}}'), [AGAIN_1]),
        (gone("1_supervised/checkpoint.pth"), [CHANGED]),
        (half("1_supervised/checkpoint.pth"), [CHANGED]),
        (garbage("2_pseudo_label/masks/b.png"), ["masks/b.png: changed or gone", AGAIN_2]),
        (file_for_a_folder("2_pseudo_label/masks"), ["masks/a.png and 3 more files", AGAIN_2]),
        (file_for_a_folder("3_select"), ["demo/3_select: cannot write this file (File exists)"]),
        (file_for_a_folder("tensorboard"), ["demo/tensorboard: cannot write this file"]),
        (folder_for_a_file("log.txt"), ["demo/log.txt: cannot write this file (Is a directory)"]),
    ],
)
def test_bad_run_folder(train, run, spoil, told):
    assert train() == "error: as far as this goes"
    spoil(run)
    line = train()
    assert [part for part in told if part not in line] == []


def test_the_way_out_leads_out(train, run):
    train()
    text("2_pseudo_label/masks/b.png", "else")(run)
    assert AGAIN_2 in train()
    text("2_pseudo_label/masks/b.png", "b")(run)
    assert train() == "error: as far as this goes"
    gone("2_pseudo_label/masks/b.png")(run)
    assert AGAIN_2 in train()
    assert train("--from-stage", "2") == "error: as far as this goes"
    garbage("config.yaml")(run)
    assert AGAIN_1 in train()
    assert train("--from-stage", "1") == "error: as far as this goes"
    garbage("environment.json")(run)
    assert train("--fresh", "demo") == "error: as far as this goes"


def test_a_picture_that_cannot_be_drawn_costs_no_result(train, run, monkeypatch):
    def fail(*_):
        raise UserError("no picture")

    monkeypatch.setattr(train_program, "_keep_predictions", fail)
    assert train("stages=[1]") == "error: no picture"
    assert json.loads((run / "results.json").read_text())["miou"] == 0.5


def test_garbage_in_metrics_is_left_out_when_stages_are_done_again(train, run):
    train()
    metrics = run / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(b'\xff\n[1]\n{"stage": 3}\n' + whole + b'{"stage": "2_')
    assert train("--from-stage", "2") == "error: as far as this goes"
    assert metrics.read_bytes() == whole
    stages = [json.loads(line)["stage"] for line in whole.splitlines()]
    assert stages == ["1_supervised", "1_fold_1", "1_fold_2"]


# Options of eval.py of which one would do nothing.
APART = [
    "--diagnose x --save-masks y",
    "--diagnose x --config y",
    "--diagnose x --reset-classifier",
    "--diagnose x --images y --out z",
    "--export x --diagnose y",
    "--export x --json y",
    "--export x --save-masks y",
    "--export x --markdown",
    "--export x --groups y",
    "--images x --out y --groups z",
    "--diagnose x --groups y",
    "--images x --out y --json z",
    "--images x --out y --save-masks z",
    "--images x --out y --markdown",
    "--markdown --save-masks x",
    "other.pth --save-masks x",
    "other.pth --export x",
    "other.pth --images x --out y",
    "other.pth --diagnose x",
]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], ["the following arguments are required: --config", "--help"]),
        (["--config"], ["--config: expected one argument"]),
        ([*DEMO, "--from-stage", "7"], ["--from-stage: invalid choice: 7"]),
        ([*DEMO, "--from-stage", "two"], ["--from-stage: invalid int value"]),
        ([*DEMO, "--fresh"], ["--fresh: expected one argument"]),
        ([*DEMO, "--fresh", "demos"], ["--fresh", "is called 'demo', not 'demo"]),
        ([*DEMO, "--fresh", "demo", "--from-stage", "2"], ["not allowed with argument --fresh"]),
        ([*DEMO, "--fresh", "demo", "--verify"], ["--fresh and --verify do not go together"]),
        ([*DEMO, "--resume"], ["unrecognized arguments: --resume"]),
        ([*DEMO, "name=a/b"], ["name", "'a/b' is not allowed"]),
        ([*DEMO, "checkpoint_every=0"], ["checkpoint_every", "greater than 0"]),
        (["--config", "."], [".: no such config here"]),
        (["--config", "no.yaml"], ["no.yaml: no such config here or in configs/", "demo.yaml"]),
        (["seed=1", "--config", "demo.yaml", "sead=2"], ["unknown key 'sead'"]),  # on both sides
        (["eval"], ["name a checkpoint, such as outdir/"]),
        (["eval", "--masks", "x"], ["--masks: takes --config FILE and no checkpoint"]),
        (["eval", "nowhere.pth", "--save", "confidence"], ["--save: goes with --images"]),
        (["eval", "no.pth", "./no.pth"], ["./no.pth: is named twice; name it once"]),
        (["eval", "nowhere.pth"], ["nowhere.pth: no such checkpoint"]),
        (["eval", "nowhere.pth", "--jsn", "x"], ["unrecognized arguments: --jsn"]),
        (["eval", "nowhere.pth", "--out", "x"], ["--images and --out go together"]),
        (["eval", "nowhere.pth", "--images", "x"], ["--images and --out go together"]),
        *((["eval", "no.pth", *pair.split()], ["do not go together; leave one"]) for pair in APART),
    ],
)
def test_bad_command_line(complaint, words, told):
    """Of ``eval.py`` if that is the first word, else of ``train.py``."""
    program = eval_program if words[:1] == ["eval"] else train_program
    line = complaint(program, *(word for word in words if word != "eval"))
    assert [part for part in told if part not in line] == []
