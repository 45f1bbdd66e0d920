"""What a run shows while it works: curves and pictures in loggers, the time that is left."""

import sys

import pytest
from conftest import refusal
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dataset.lists import read_splits
from dataset.training import planned_work
from utils.config.reading import read_config
from utils.progress import RunBar, Work, clock, seconds_left
from utils.run.loggers import TensorBoard, open_loggers, tagged

PLAN = {
    "1": Work("train", 100),
    "2": Work("label", 50),
    "4": Work("train", 300),
    "5": Work("label", 10),
}


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    return accumulator.Reload()


def steps(accumulator, tag):
    return [event.step for event in accumulator.Scalars(tag)]


@pytest.mark.parametrize(
    ("seconds", "running", "share", "left"),
    [
        ({}, None, 0, None),
        ({"1": 0.0}, "1", 0, None),
        ({"1": 10.0}, None, 0, 36),  # 10 a second, all other work too
        ({"1": 5.0}, "1", 0.5, 5 + 36),
        ({"1": 10.0, "2": 25.0}, None, 0, 30 + 5),  # labels: 2 a second
        ({"1": 10.0, "2": 25.0, "4": 40.0}, "4", 0.5, 150 / 5 + 5),  # 250 in 50 seconds by now
        ({"1": 1.0, "2": 1.0, "4": 1.0, "5": 1.0}, None, 0, 0),
    ],
)
def test_time_left_by_hand(seconds, running, share, left):
    found = seconds_left(PLAN, seconds, running, share)
    assert found is None if left is None else found == pytest.approx(left)


def test_times_are_minutes_and_hours():
    assert [clock(s) for s in (0, 61.4, 3600, 36_061)] == ["0:00", "1:01", "1:00:00", "10:01:01"]


def test_a_stage_that_ends_tells_what_is_left():
    bar = RunBar(PLAN)
    assert bar.end("1", 10.0) == "; about 0:36 left of the run"
    bar.show("2", 5.0, 0.5)
    assert bar.end("elsewhere", 9.0) == "; about 0:36 left of the run"
    for name in ("2", "4"):
        assert "left of the run" in bar.end(name, 20.0)
    assert bar.end("5", 1.0) == ""
    assert RunBar({}).end("1", 10.0) == ""


def test_planned_work_by_hand(demo_root):
    words = [f"dataset.root={demo_root}", "retrain={iterations: 10, batch_size: 4}"]
    words += ["supervised={iterations: 7, batch_size: 2}", "inference.long_side=100"]
    words += [
        "pseudo_label={scales: [1, 2], flip: true, neighbours: true, neighbour_scales: [2, 4]}"
    ]
    config = read_config("demo.yaml", [*words, "augment.crop_size=10"])
    splits = read_splits(config.dataset)  # 6 labeled, 10 unlabeled
    plan = planned_work(config, splits)
    views = 2 * (1 + 4) + (4 + 16) / 2
    assert {name: work.amount for name, work in plan.items()} == {
        "1_supervised": 7 * 2 * (2 * 3) * 100,
        "2_pseudo_label": 10 * views * 10_000,
        "3_select": 16 * 10_000,
        "4_retrain": 10 * 4 * (3 * 2 + 1) * 100,
        "5_relabel": 5 * views * 10_000,
        "6_retrain": 10 * 4 * (3 * 2 + 1) * 100,
    }
    assert plan["4_retrain"].kind == plan["6_retrain"].kind != plan["1_supervised"].kind
    config = read_config("demo.yaml", [*words, "stages=[1, 2, 6]"])
    assert list(planned_work(config, splits)) == ["1_supervised", "2_pseudo_label", "6_retrain"]


def test_numbers_have_the_tags_of_their_kind():
    numbers = {"ce": 1.0, "weight": 0.5, "lr": 0.1, "miou": 0.4}
    assert tagged("4_retrain", numbers, {"cat": 0.3, "dog": None}) == {
        **{"loss/ce": 1.0, "weight": 0.5, "lr": 0.1, "miou": 0.4, "iou/cat": 0.3, "stage": 4}
    }


def test_iterations_that_are_repeated_count_once(tmp_path, demo_overrides):
    config = read_config("demo.yaml", demo_overrides)
    for begin, end, value in ((1, 6, 1.0), (4, 8, 2.0)):  # killed after 5, kept until 3
        logger = TensorBoard(tmp_path, config)
        for iteration in range(begin, end):
            logger.scalars({"miou": value}, iteration)
        logger.result(value)
        logger.close()
    found = events(tmp_path).Scalars("miou")
    assert [(event.step, event.value) for event in found] == [
        *((step, 1.0) for step in (1, 2, 3)),
        *((step, 2.0) for step in (4, 5, 6, 7)),
    ]
    assert [event.value for event in events(tmp_path / "hparams").Scalars("final_miou")] == [2.0]


@pytest.mark.slow
def test_a_run_has_curves_on_one_axis(finished):
    run, _ = finished
    board = events(run / "tensorboard")
    iterations = [3, 6, 7, 8, 10, 12]  # batches of 4: 12, 5 and 10 samples an epoch, two epochs
    for tag in ("lr", "images_per_second", "stage"):
        assert steps(board, tag) == iterations
    for tag in ("miou", "iou/background"):  # of the last epoch of each stage
        assert steps(board, tag) == [6, 8, 12]
    assert [event.value for event in board.Scalars("stage")] == [1, 1, 4, 4, 6, 6]
    assert steps(board, "loss/ce") == iterations[:2]
    for tag in ("loss/unlabeled", "loss/labeled", "weight"):
        assert steps(board, tag) == iterations[2:]
    assert [event.step for event in board.Images("query_panel")] == [8, 12]
    text = board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "backbone: resnet18" in text
    last = events(run / "tensorboard" / "hparams")
    assert last.Scalars("final_miou")[0].value == pytest.approx(board.Scalars("miou")[-1].value)
    summaries = last.PluginTagToContent("hparams")
    assert b"model.backbone" in summaries["_hparams_/session_start_info"]


@pytest.mark.slow
def test_without_a_terminal_each_stage_ends_in_a_line(finished):
    _, printed = finished
    assert "\r" not in printed
    ends = [line for line in printed.splitlines() if " done in " in line]
    assert [line.split()[0][0] for line in ends] == list("123456")
    assert all("left of the run" in line for line in ends[:-1])
    assert "left" not in ends[-1]


@pytest.mark.slow
def test_loggers_are_switches_of_a_run(demo_overrides, tmp_path, run_program, monkeypatch):
    """They can change when a run continues; Weights & Biases writes into the run folder."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = [*demo_overrides, "name=tracked", "stages=[1]"]
    done = run_program(
        "train.py", "--config", "demo.yaml", *words, "tensorboard=false", "wandb=mine"
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "outdir" / "tracked"
    assert not (run / "tensorboard").exists()
    (offline,) = (run / "wandb").glob("offline-run-*")
    assert offline.name.endswith((run / "wandb" / "id").read_text())
    assert list(offline.glob("run-*.wandb"))
    again = run_program("train.py", "--config", "demo.yaml", *words)
    assert again.returncode == 0, again.stderr
    assert (run / "tensorboard" / "hparams").exists()
    words += ["--fresh", "tracked"]
    fresh = run_program("train.py", "--config", "demo.yaml", *words, "tensorboard=false")
    assert fresh.returncode == 0, fresh.stderr
    assert not (run / "wandb").exists()
    assert not (run / "tensorboard").exists()


@pytest.mark.slow
def test_weights_and_biases_takes_pictures_and_goes_on_under_its_id(
    demo_overrides, tmp_path, monkeypatch
):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = read_config("demo.yaml", [*demo_overrides, "wandb=mine", "tensorboard=false"])
    for _ in range(2):
        (logger,) = open_loggers(tmp_path, config)
        logger.scalars({"miou": 0.5}, 3)
        logger.picture("query_panel", Image.new("RGB", (6, 4), (255, 0, 0)), 3)
        logger.result(0.5)
        logger.close()
    name = (tmp_path / "wandb" / "id").read_text()
    kept = [file.name for file in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")]
    assert kept == [f"run-{name}.wandb"] * 2
    pictures = list((tmp_path / "wandb").glob("offline-run-*/files/media/images/query_panel*.png"))
    assert pictures
    assert Image.open(pictures[0]).size == (6, 4)


def test_a_missing_package_is_one_line(demo_overrides, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = read_config("demo.yaml", [*demo_overrides, "wandb=mine", "tensorboard=false"])
    assert "pip install wandb, or set wandb=null" in refusal(open_loggers, tmp_path, config)
    assert not list(tmp_path.iterdir())
    config = read_config("demo.yaml", [*demo_overrides, "tensorboard=false"])
    assert open_loggers(tmp_path, config) == []


def test_pictures_are_shown_at_their_iteration(tmp_path, demo_overrides):
    board = TensorBoard(tmp_path, read_config("demo.yaml", demo_overrides))
    board.picture("query_panel", Image.new("RGB", (6, 4), (255, 0, 0)), 30)
    board.close()
    (picture,) = events(tmp_path).Images("query_panel")
    assert (picture.step, picture.width, picture.height) == (30, 6, 4)
