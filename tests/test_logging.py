"""What a run shows while it works: lines, and curves and pictures in loggers."""

import sys

import pytest
from conftest import refusal
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.config.reading import read_config
from utils.progress import clock
from utils.run.loggers import TensorBoard, add_tags, open_loggers


def events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    return accumulator.Reload()


def steps(accumulator, tag):
    return [event.step for event in accumulator.Scalars(tag)]


def test_times_are_minutes_and_hours():
    assert [clock(s) for s in (0, 61.4, 3600, 36_061)] == ["0:00", "1:01", "1:00:00", "10:01:01"]


def test_numbers_have_the_tags_of_their_kind():
    numbers = {"ce": 1.0, "weight": 0.5, "lr": 0.1, "miou": 0.4}
    assert add_tags("4_retrain", numbers, {"cat": 0.3, "dog": None}) == {
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
    # Batches of 4: 12, 5 and 10 samples an epoch, two epochs; of each fold 6, two epochs.
    iterations = [3, 6, *range(7, 11), 11, 12, 14, 16]
    for tag in ("lr", "images_per_second", "stage"):
        assert steps(board, tag) == iterations
    for tag in ("miou", "iou/background"):  # of the last epoch of each stage
        assert steps(board, tag) == [6, 8, 10, 12, 16]
    assert [event.value for event in board.Scalars("stage")] == [1] * 6 + [4, 4, 6, 6]
    assert steps(board, "loss/ce") == iterations[:6]
    for tag in ("loss/unlabeled", "loss/labeled", "weight"):
        assert steps(board, tag) == iterations[6:]
    assert [event.step for event in board.Images("query_panel")] == [12, 16]
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
    assert [line.split()[0][0] for line in ends] == list("1112234556")


@pytest.mark.exhaustive
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


@pytest.mark.parametrize(
    ("project", "told"), [("mine", "No API key configured"), ("a/b", "Invalid project name 'a/b'")]
)
def test_wandb_that_refuses_is_told(demo_overrides, tmp_path, monkeypatch, project, told):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    wandb.teardown()  # else it keeps the mode of an earlier test in this process
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    words = [*demo_overrides, f"wandb={project}", "tensorboard=false"]
    line = refusal(open_loggers, tmp_path, read_config("demo.yaml", words))
    assert line.startswith(f"wandb: {told}")
    assert "or wandb=null" in line
