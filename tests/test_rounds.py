"""A finished run goes on with other lists: what is kept, what is done again, after any kill."""

import json
import os
import shutil

import pytest
from conftest import refusal

from utils.config.reading import read_config
from utils.run.rounds import former_network
from utils.run.stages import Run

FIRST = {"labeled": "25", "unlabeled": "75", "val": "v"}
MORE = {"labeled": "50", "unlabeled": "50", "val": "v"}
OTHERS = {"labeled": "25", "unlabeled": "90", "val": "v"}  # more images, no more labels
LAST = "supervised.start=last"
UNLIKE = ("log.txt", "environment.json", "lock", "lock.holder")


def run_stages(outdir, lists, *words, from_stage=None):
    """Do four stages; what a stage makes tells its lists and settings. Return those done."""
    settings = [f"outdir={outdir}", "device=cpu", "precision=fp32", "tensorboard=false", *words]
    config, done = read_config("demo.yaml", settings), []

    def work(stage, *read):
        done.append(stage.name)
        stage.log.tidy(stage.name)  # as every training stage begins
        stage.record(1, {"ce": 0.5})
        made = " ".join(lists[name] for name in read)
        file = "checkpoint.pth" if stage.name[0] in "16" else "confidence.csv"
        (stage.folder / file).write_text(made)
        start = former_network(stage.folder.parent)
        return {"miou": 0.25, "per_class_iou": {}, "start": start and start.read_text()}

    with Run(config, from_stage, lists=lists) as run:
        run.stage("1_supervised", work, "labeled")
        run.stage("1_fold_1", work, "labeled")
        run.stage("2_pseudo_label", work, "labeled", "unlabeled")
        run.stage("6_retrain", work, "labeled", "unlabeled")
        run.finish()
    return done


def contents(folder):
    """Return what all files of a run say but the log, times and the lock."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in UNLIKE:
            text = path.read_text()
            if path.suffix == ".json" and path.name != "lists.json":
                content = json.loads(text)
                content.pop("seconds", None), content.pop("files", None)
                for report in content.get("stages", {}).values():
                    report.pop("seconds")
                text = json.dumps(content)
            found[str(path.relative_to(folder))] = text
    return found


ALL = ["1_supervised", "1_fold_1", "2_pseudo_label", "6_retrain"]


def test_more_labels_begin_a_round_and_the_result_stays(tmp_path, capsys):
    run = tmp_path / "demo"
    run_stages(tmp_path, FIRST)
    before = contents(run)
    (run / "suggested").mkdir()
    (run / "suggested/list.txt").write_text("a.jpg\n")
    (run / "mine.txt").write_text("mine")
    assert run_stages(tmp_path, FIRST, LAST) == []  # nothing has changed
    capsys.readouterr()
    shorter = [LAST, "supervised.iterations=80", "retrain.iterations=100"]
    assert run_stages(tmp_path, MORE, *shorter) == ALL
    said = capsys.readouterr().out
    told = f"{run}: the result so far, mIoU 25.00 %, is in {run}/rounds/1; all stages start again"
    assert said.splitlines()[0] == told
    kept = contents(run / "rounds/1")
    assert kept.pop("suggested/list.txt") == "a.jpg\n"
    kept["config.yaml"] = kept["config.yaml"].replace("start: last", "start: encoder")
    assert kept == before
    assert not (run / "suggested").exists()
    assert (run / "mine.txt").read_text() == "mine"
    report = json.loads((run / "results.json").read_text())["stages"]["1_supervised"]
    assert report["start"] == "25 75"  # the last network of the first round
    assert run_stages(tmp_path, MORE, *shorter) == []
    assert run_stages(tmp_path, FIRST, *shorter) == ALL  # and so on
    assert sorted(x.name for x in (run / "rounds").iterdir()) == ["1", "2"]
    assert former_network(run) == run / "rounds/2/6_retrain/checkpoint.pth"


def test_stages_that_saw_only_what_has_not_changed_are_kept(tmp_path, capsys):
    run = tmp_path / "demo"
    run_stages(tmp_path, FIRST)
    assert run_stages(tmp_path, OTHERS, LAST) == ALL[2:]
    assert (
        "is in " + f"{run}/rounds/1; 1_supervised, 1_fold_1 kept, later" in capsys.readouterr().out
    )
    assert (run / "rounds/1/1_supervised/checkpoint.pth").read_text() == "25"
    assert (run / "1_supervised/checkpoint.pth").samefile(
        run / "rounds/1/1_supervised/checkpoint.pth"
    )
    assert (run / "rounds/1/6_retrain/checkpoint.pth").read_text() == "25 75"
    assert (run / "6_retrain/checkpoint.pth").read_text() == "25 90"
    lines = [(folder / "metrics.jsonl").read_text() for folder in (run, run / "rounds/1")]
    assert lines[0] == lines[1]
    assert "retrain.epochs=80" in refusal(run_stages, tmp_path, OTHERS, LAST, "retrain.epochs=7")


def test_without_the_setting_other_lists_are_refused_with_the_way_on(tmp_path):
    run_stages(tmp_path, FIRST)
    line = refusal(run_stages, tmp_path, MORE)
    way = "set supervised.start=last without --from-stage to go on from its result"
    assert "another list dataset.labeled, another list dataset.unlabeled; restore that" in line
    assert way in line
    assert way in refusal(run_stages, tmp_path, MORE, LAST, from_stage=6)
    other_val = refusal(run_stages, tmp_path, {**MORE, "val": "w"}, LAST)
    assert "another list dataset.val" in other_val  # the results could not be compared
    assert way not in other_val
    (tmp_path / "demo/results.json").unlink()  # it has not finished
    assert way not in refusal(run_stages, tmp_path, MORE, LAST)


def test_a_fresh_run_has_no_former_network(tmp_path):
    run_stages(tmp_path, FIRST)
    run_stages(tmp_path, MORE, LAST)
    settings = [f"outdir={tmp_path}", "device=cpu", "precision=fp32", LAST]
    with Run(read_config("demo.yaml", settings), fresh=True) as run:
        assert former_network(run.folder) is None


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Wait for no disk, as a kill loses nothing that the system has taken, and for no git."""
    for name in ("sync", "fsync"):
        monkeypatch.setattr(os, name, lambda *_: None)
    monkeypatch.setattr("utils.run.results._git", lambda *_: None)


class Killed(BaseException):
    """Stands for a kill."""


def kill_at(monkeypatch, moment):
    """End the program right before so many files have been renamed, removed or linked."""
    count = [0]

    def fatal(operation):
        def do(*args, **keys):
            count[0] += 1
            if count[0] >= moment:
                raise Killed
            return operation(*args, **keys)

        return do

    for name in ("rename", "replace", "link", "unlink"):
        monkeypatch.setattr(os, name, fatal(getattr(os, name)))
    return count


@pytest.mark.slow
@pytest.mark.parametrize("lists", [MORE, OTHERS], ids=["labels", "images"])
def test_a_kill_at_any_moment_leaves_a_run_that_goes_on(tmp_path, monkeypatch, lists):
    run_stages(tmp_path / "quiet", FIRST)
    shutil.copytree(tmp_path / "quiet", tmp_path / "begun")
    run_stages(tmp_path / "quiet", lists, LAST)
    expected, moment = contents(tmp_path / "quiet/demo"), 0
    while True:
        moment += 1
        shutil.copytree(tmp_path / "begun", tmp_path / "out")
        with monkeypatch.context() as patched:
            kill_at(patched, moment)
            try:
                run_stages(tmp_path / "out", lists, LAST)
                break
            except Killed:
                pass
        run_stages(tmp_path / "out", lists, LAST)
        found = contents(tmp_path / "out/demo")
        for files in (found, expected):
            for name in [name for name in files if name.endswith("config.yaml")]:
                files[name] = files[name].replace(str(tmp_path / "out"), str(tmp_path / "quiet"))
        assert found == expected, f"killed at {moment}"
        shutil.rmtree(tmp_path / "out")
    assert moment > 20
