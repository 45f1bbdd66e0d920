import json

import pytest
import yaml

from utils.errors import UserError
from utils.read_config import read_config
from utils.results import stage_table
from utils.run import Run


def config(tmp_path, *words):
    return read_config("demo.yaml", [f"outdir={tmp_path}", "device=cpu", *words])


def work(log):
    def do(stage, *inputs):
        log.append((stage.name, inputs))
        (stage.folder / "made.txt").write_text(stage.name)
        return {"miou": 0.5, "per_class_iou": {"ball": 0.5}}

    return do


def run_stages(settings, from_stage=None):
    log = []
    with Run(settings, from_stage) as run:
        first = run.stage("1_supervised", work(log), 1, 2)
        run.stage("2_pseudo_label", work(log), first)
        run.finish()
    return log


def test_a_stage_is_done_once_and_hands_its_folder_on(tmp_path):
    settings = config(tmp_path)
    folder = tmp_path / "demo" / "1_supervised"
    assert run_stages(settings) == [("1_supervised", (1, 2)), ("2_pseudo_label", (folder,))]
    assert run_stages(settings) == []


def test_a_stage_that_fails_is_done_again(tmp_path):
    def fail(stage):
        (stage.folder / "made.txt").write_text("half")
        raise KeyboardInterrupt

    with Run(config(tmp_path)) as run, pytest.raises(KeyboardInterrupt):
        run.stage("1_supervised", fail)
    assert [name for name, _ in run_stages(config(tmp_path))] == ["1_supervised", "2_pseudo_label"]


def test_from_stage_removes_that_stage_and_later_ones(tmp_path):
    run_stages(config(tmp_path))
    assert [name for name, _ in run_stages(config(tmp_path), 2)] == ["2_pseudo_label"]
    assert len(run_stages(config(tmp_path), 1)) == 2


def test_another_config_is_refused_with_the_keys_that_differ(tmp_path):
    run_stages(config(tmp_path))
    other = config(tmp_path, "optimizer.lr=0.5", "query.min_area=0.1")
    with pytest.raises(UserError) as error:
        Run(other)
    assert "optimizer.lr=" in str(error.value)
    assert "query.min_area=" in str(error.value)
    assert "--from-stage 1" in str(error.value)
    with pytest.raises(UserError):
        Run(other, from_stage=2)
    assert len(run_stages(other, from_stage=1)) == 2


def test_a_run_from_which_nothing_came_may_change(tmp_path):
    with Run(config(tmp_path)) as run, pytest.raises(UserError):
        run.stage("1_supervised", fail_at_once)
    assert len(run_stages(config(tmp_path, "optimizer.lr=0.5"))) == 2


def fail_at_once(stage):
    raise UserError("no weights")


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """Keys that it did not know have their defaults."""
    run_stages(config(tmp_path))
    path = tmp_path / "demo" / "config.yaml"
    kept = yaml.safe_load(path.read_text())
    del kept["model"]["stem"]
    path.write_text(yaml.safe_dump(kept))
    assert run_stages(config(tmp_path)) == []


def test_settings_that_change_no_result_may_differ(tmp_path):
    run_stages(config(tmp_path))
    assert run_stages(config(tmp_path, "workers=0")) == []


def test_results_are_the_last_stages(tmp_path):
    run_stages(config(tmp_path))
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["name"] == "demo"
    assert results["miou"] == 0.5
    assert results["per_class_iou"] == {"ball": 0.5}
    assert list(results["stages"]) == ["1_supervised", "2_pseudo_label"]
    environment = json.loads((tmp_path / "demo" / "environment.json").read_text())
    assert environment["device"] == "cpu"
    assert environment["torch"]


def test_epochs_are_kept_as_json_lines_and_in_the_log(tmp_path):
    def do(stage):
        stage.record(3, {"ce": 0.25, "miou": 0.5})
        return {}

    with Run(config(tmp_path)) as run:
        run.stage("1_supervised", do)
    line = json.loads((tmp_path / "demo" / "metrics.jsonl").read_text())
    assert line == {"stage": "1_supervised", "epoch": 3, "ce": 0.25, "miou": 0.5}
    assert "epoch 3  ce 0.25  miou 0.5" in (tmp_path / "demo" / "log.txt").read_text()
    assert list((tmp_path / "demo" / "tensorboard").iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write this file"):
        Run(config(tmp_path / "file"))


def test_table():
    stages = {
        "1_supervised": {"miou": 0.41234, "seconds": 61.4},
        "2_pseudo_label": {"images": 108, "confidence": 0.9, "coverage": 1.0, "seconds": 3.0},
    }
    head, *lines = stage_table(stages, "last").splitlines()
    assert head.split()[:3] == ["stage", "mIoU", "(last)"]
    assert lines[0].split() == ["1_supervised", "41.23", "%", "-", "-", "-", "-", "1:01"]
    assert lines[1].split() == [
        "2_pseudo_label",
        "-",
        "108",
        "100.00",
        "%",
        "90.00",
        "%",
        "-",
        "0:03",
    ]
