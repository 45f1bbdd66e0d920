import hashlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import time

import pytest
import torch
import yaml
from conftest import refusal

from utils import IMAGENET
from utils.config.reading import read_config
from utils.config.stages import HOW
from utils.errors import UserError, _line_of
from utils.run import stages
from utils.run.results import stage_table
from utils.run.stages import Run, Stage, lock_folder
from utils.scores import describe_mean


def config(tmp_path, *words):
    settings = [f"outdir={tmp_path}", "device=cpu", "precision=fp32"]
    return read_config("demo.yaml", [*settings, *words])


def work(log):
    def do(stage, *inputs):
        log.append((stage.name, inputs))
        (stage.folder / "confidence.csv").write_text(stage.name)
        return {"miou": 0.5, "per_class_iou": {"ball": 0.5}}

    return do


def run_stages(settings, from_stage=None, fresh=False):
    log = []
    with Run(settings, from_stage, fresh) as run:
        first = run.stage("1_supervised", work(log), 1, 2)
        run.stage("2_pseudo_label", work(log), first)
        run.finish()
    return log


def test_a_stage_is_done_once_and_hands_its_folder_on(tmp_path):
    settings = config(tmp_path)
    folder = tmp_path / "demo" / "1_supervised"
    assert run_stages(settings) == [("1_supervised", (1, 2)), ("2_pseudo_label", (folder,))]
    assert run_stages(settings) == []
    free = ["workers=0", "checkpoint_every=7", "cache=ram"]  # change no result
    assert run_stages(config(tmp_path, *free)) == []


def test_a_stage_that_is_gone_is_done_again_and_what_it_makes_new_counts(tmp_path):
    settings = config(tmp_path)
    run_stages(settings)
    made = tmp_path / "demo" / "1_supervised"
    shutil.rmtree(made)
    assert [name for name, _ in run_stages(settings)] == [
        "1_supervised"
    ]  # the same files as before
    shutil.rmtree(made)

    def other(stage):
        (stage.folder / "confidence.csv").write_text("other")
        return {"miou": 0.5, "per_class_iou": {}}

    def interrupted(stage):
        (stage.unfinished / "resume.pth").write_text("state")
        (stage.folder / "confidence.csv").write_text("half")
        raise KeyboardInterrupt

    with Run(settings) as run:
        run.stage("1_supervised", other)
        with pytest.raises(KeyboardInterrupt):
            run.stage("2_pseudo_label", interrupted)
    log = tmp_path / "demo" / "log.txt"
    assert log.read_text().count("was made from other files") == 1
    shutil.rmtree(made)
    log_of_stages = run_stages(settings)  # stage 1 as at first, and stage 2 from its beginning
    assert [name for name, _ in log_of_stages] == ["1_supervised", "2_pseudo_label"]
    assert log.read_text().count("was made from other files") == 2


def test_what_a_kill_left_of_removed_stages_is_removed(tmp_path):
    folder = tmp_path / "demo" / "2_pseudo_label" / "masks"
    folder.mkdir(parents=True)
    (folder / "old.png").write_text("of another run")
    run_stages(config(tmp_path), from_stage=3)
    assert not folder.exists()


def test_a_stage_that_fails_is_done_again(tmp_path):
    def fail(stage):
        (stage.folder / "confidence.csv").write_text("half")
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
    line = refusal(run_stages, other)
    assert all(part in line for part in ("optimizer.lr=", "query.min_area=", "--from-stage 1"))
    assert refusal(run_stages, other, from_stage=2)
    assert len(run_stages(other, from_stage=1)) == 2


def test_results_of_other_settings_do_not_pass_for_those_of_a_run_that_was_stopped(tmp_path):
    run_stages(config(tmp_path))
    results = tmp_path / "demo" / "results.json"
    with Run(config(tmp_path)):
        assert results.is_file()
    with Run(config(tmp_path, "retrain.epochs=7")):  # and then it is killed
        assert not results.exists()
    run_stages(config(tmp_path, "retrain.epochs=7"))
    assert results.is_file()


def test_what_no_kept_stage_has_read_may_change(tmp_path):
    run_stages(config(tmp_path))
    assert run_stages(config(tmp_path, "retrain.epochs=7")) == []
    assert len(run_stages(config(tmp_path, "retrain.epochs=7", "pseudo_label.flip=false"), 2)) == 1
    line = refusal(run_stages, config(tmp_path, "retrain.epochs=7"))
    assert "its stages used pseudo_label.flip=False; restore that" in line
    assert line.endswith("or redo 2_pseudo_label and later stages with --from-stage 2")


def test_a_stage_that_is_begun_keeps_its_settings(tmp_path):
    def begun(stage):
        (stage.unfinished / "resume.pth").write_text("state")
        raise UserError("as far as this goes")

    with Run(config(tmp_path)) as run, pytest.raises(UserError):
        run.stage("1_supervised", begun)
    assert "do 1_supervised" in refusal(run_stages, config(tmp_path, "optimizer.lr=0.5"))
    assert len(run_stages(config(tmp_path, "retrain.epochs=7"))) == 2


def test_every_setting_that_full_memory_advises_may_change_in_a_finished_run(tmp_path):
    run_stages(config(tmp_path))
    advice = _line_of(MemoryError())
    keys = re.findall(r"[a-z_]+[.][a-z_]+", advice)
    assert set(keys) == set(HOW)
    values = {"supervised.accumulate": 2, "retrain.accumulate": 2, "inference.batch_size": 1}
    values |= {"inference.window": "{size: 512}"}
    words = [f"{key}={values[key]}" for key in keys]
    assert run_stages(config(tmp_path, *words)) == []
    log = (tmp_path / "demo" / "log.txt").read_text()
    assert "supervised.accumulate: was 1 in 1_supervised, whose results stay" in log
    assert "retrain.accumulate" not in log  # no stage has read it
    assert run_stages(config(tmp_path, *words)) == []


def test_a_run_from_which_nothing_came_may_change(tmp_path):
    def fail_at_once(stage):
        raise UserError("no weights")

    with Run(config(tmp_path)) as run, pytest.raises(UserError):
        run.stage("1_supervised", fail_at_once)
    assert len(run_stages(config(tmp_path, "optimizer.lr=0.5"))) == 2


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """Keys that it did not know have their defaults."""
    run_stages(config(tmp_path))
    path = tmp_path / "demo" / "config.yaml"
    kept = yaml.safe_load(path.read_text())
    del kept["model"]["stem"]
    path.write_text(yaml.safe_dump(kept))
    assert run_stages(config(tmp_path)) == []


def test_a_fresh_run_leaves_nothing_of_the_old_one(tmp_path):
    run_stages(config(tmp_path))
    folder = tmp_path / "demo"
    mine = [folder / "notes.txt", folder / "2_mine" / "a.txt", folder / "1_supervised" / "b.txt"]
    mine.append(folder / "2_pseudo_label" / "masks" / "own.png")
    mine[1].parent.mkdir()
    mine[3].parent.mkdir()
    for file in mine:
        file.write_text("mine")
    other = config(tmp_path, "optimizer.lr=0.5")
    assert len(run_stages(other, fresh=True)) == 2
    assert [file.read_text() for file in mine] == ["mine"] * 4
    assert (folder / "log.txt").read_text().count(f"{folder} on cpu") == 1


def test_predictions_and_panels_go_with_the_stages_they_show(tmp_path):
    run_stages(config(tmp_path))
    folder = tmp_path / "demo"
    made = ["val/1_supervised/images.csv", "val/1_supervised/masks/a/b.png", "val/labels/a/b.png"]
    made += ["val/6_retrain/made_from", "2_pseudo_label/panels/epoch_010.png", "diagnosis.json"]
    mine = ["val/notes.txt", "2_pseudo_label/panels/mine.png"]
    for name in made + mine:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    run_stages(config(tmp_path), from_stage=2)
    assert [name for name in made + mine if (folder / name).exists()] == mine
    assert not (folder / "val" / "labels").exists()


def test_other_lists_are_refused_until_the_run_starts_over(tmp_path):
    def run_with(from_stage=None, **lists):
        with Run(config(tmp_path), from_stage, lists=lists) as run:
            run.stage("1_supervised", work([]))

    run_with(labeled="a", unlabeled="Z", val="c")
    run_with(labeled="a", unlabeled="b", val="c")  # stage 1 reads no unlabeled images
    with Run(config(tmp_path), lists={"labeled": "a", "unlabeled": "b", "val": "c"}) as run:
        run.stage("2_pseudo_label", work([]))
    with pytest.raises(UserError, match=r"used another list dataset\.unlabeled; restore that"):
        run_with(labeled="a", unlabeled="B", val="c")
    with pytest.raises(UserError, match=r"list dataset\.labeled, another list dataset\.val"):
        run_with(2, labeled="A", unlabeled="b", val="C")
    run_with(1, labeled="A", unlabeled="b", val="C")
    run_with(labeled="A", unlabeled="b", val="C")


def test_changed_files_are_told_and_a_run_may_move(tmp_path):
    def run_in(outdir, name, root, files):
        words = [f"outdir={outdir}", f"name={name}", f"dataset.root={root}"]
        with Run(config(tmp_path, *words), lists={"val": "a", "val files": files}) as run:
            run.stage("1_supervised", work([]))
        return (outdir / name / "log.txt").read_text()

    run_in(tmp_path / "one", "first", "here", "1")
    (tmp_path / "one").rename(tmp_path / "other")
    (tmp_path / "other" / "first").rename(tmp_path / "other" / "second")
    moved = run_in(tmp_path / "other", "second", "there", "1")
    assert "1_supervised: already finished, skipping" in moved
    assert "other sizes or times" not in moved
    for count in (1, 2):  # each time
        changed = run_in(tmp_path / "other", "second", "there", "2")
        told = "dataset.val files: other sizes or times than when the run began"
        assert changed.count(told) == count


def test_another_precision_is_refused_and_another_device_told(tmp_path):
    run_stages(config(tmp_path))
    with pytest.raises(UserError, match="its stages used precision=fp32; restore that"):
        run_stages(config(tmp_path, "precision=bf16"))
    path = tmp_path / "demo" / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "device": "cuda:1"}))
    assert run_stages(config(tmp_path)) == []
    log = (tmp_path / "demo" / "log.txt").read_text()
    assert "device cuda:1 → cpu: results may differ in their last digits" in log
    path.write_text(json.dumps({**json.loads(path.read_text()), "processes": 2}))
    assert run_stages(config(tmp_path)) == []
    log = (tmp_path / "demo" / "log.txt").read_text()
    assert "processes 2 → 1: results may differ, since dropout, mixing and, on CPUs, batch" in log


def test_seconds_count_all_sittings_whatever_the_clock_of_the_wall_does(tmp_path, monkeypatch):
    now = iter([100.0, 130.0, 7.0, 9.0])  # two sittings, of 30 and 2 seconds
    monkeypatch.setattr("utils.run.stages.time.monotonic", lambda: next(now))
    monkeypatch.setattr("time.time", lambda: 0.0)

    def interrupted(stage):
        (stage.unfinished / "resume.pth").write_text("state")
        raise KeyboardInterrupt

    with Run(config(tmp_path)) as run, pytest.raises(KeyboardInterrupt):
        run.stage("1_supervised", interrupted)
    with Run(config(tmp_path)) as run:
        folder = run.stage("1_supervised", lambda stage: {})
    assert run.stages["1_supervised"] == {"seconds": 32.0}
    assert not (folder / "unfinished").exists()


def test_results_are_the_last_stages_with_the_sha256_of_every_file(tmp_path):
    run_stages(config(tmp_path))
    folder, names = tmp_path / "demo", ["1_supervised", "2_pseudo_label"]
    results = json.loads((folder / "results.json").read_text())
    assert (results["name"], results["miou"]) == ("demo", 0.5)
    assert results["per_class_iou"] == {"ball": 0.5}
    assert list(results["stages"]) == names
    made = [f"{stage}/confidence.csv" for stage in names]
    assert list(results["files"]) == ["config.yaml", "lists.json", "environment.json", *made]
    for name, digest in results["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["device"] == "cpu"
    assert environment["torch"]


@pytest.fixture
def hashed(monkeypatch):
    """Names of the stages' files whose content is read, as they are."""
    names, sha256 = [], stages.sha256

    def counted(path):
        if path.parent.name[0] in "123456":
            names.append(f"{path.parent.name}/{path.name}")
        return sha256(path)

    monkeypatch.setattr(stages, "sha256", counted)
    return names


MADE = ["1_supervised/confidence.csv", "2_pseudo_label/confidence.csv"]


def verified(settings):
    with Run(settings, verify=True) as run:
        run.stage("1_supervised", work([]), 1, 2)


def test_files_are_read_once_and_then_when_their_time_differs_or_to_verify(tmp_path, hashed):
    settings, folder = config(tmp_path), tmp_path / "demo"
    run_stages(settings)
    assert hashed == MADE
    assert run_stages(settings) == []
    assert hashed == MADE
    verified(settings)
    assert hashed == [*MADE, MADE[0]]
    os.utime(folder / MADE[1])  # as a copy has
    assert run_stages(settings) == []
    assert hashed == [*MADE, MADE[0], MADE[1]]
    kept = json.loads((folder / "2_pseudo_label" / "stage.json").read_text())["files"]
    assert kept["confidence.csv"].keys() == {"size", "mtime_ns", "sha256"}


def test_changed_files_are_refused_by_size_by_time_or_to_verify(tmp_path):
    settings, file = config(tmp_path), tmp_path / "demo" / MADE[0]
    run_stages(settings)
    status = file.stat()
    file.write_text("1_supervisea")  # as long
    line = f"{file}: changed or gone since 1_supervised ended"
    assert refusal(run_stages, settings).startswith(line)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert run_stages(settings) == []
    assert refusal(verified, settings).startswith(line)
    file.write_text("longer than before")
    assert refusal(run_stages, settings).startswith(line)


def test_a_file_that_is_gone_when_its_stage_ends_is_told(tmp_path):
    with Run(config(tmp_path)) as run:
        path = run.stage("1_supervised", lambda _: {"miou": 0.5}) / "checkpoint.pth"
        line = refusal(run.digest, path)
    assert line.startswith(f"{path}: was gone when its stage ended; ")
    assert line.endswith("with --from-stage 1")


def test_the_disk_has_all_files_before_the_stage_has_ended(tmp_path, monkeypatch):
    ended = []
    folder = tmp_path / "demo"
    monkeypatch.setattr(os, "sync", lambda: ended.append(len(list(folder.glob("*/stage.json")))))
    run_stages(config(tmp_path))
    assert ended == [0, 1]


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


def test_a_loss_that_is_not_finite_is_told_with_a_way_out_that_leads_out(tmp_path):
    def spoilt(stage):
        stage.refuse_not_finite(4, 0, float("inf"), ["a.jpg", "b.jpg"])

    with Run(config(tmp_path)) as run:
        run.stage("1_supervised", work([]))
        line = refusal(run.stage, "2_pseudo_label", spoilt)
    assert line == (
        "2_pseudo_label, epoch 5, iteration 1: the loss is inf on a.jpg, b.jpg; lower "
        "optimizer.lr or set precision=fp32, and start over with --from-stage 1"
    )
    assert len(run_stages(config(tmp_path, "optimizer.lr=0.0001"), from_stage=1)) == 2
    with pytest.raises(UserError, match=r"the loss is 0\.5, but its gradient is not finite, on a"):
        Stage("4_retrain", tmp_path, *[None] * 3, None).refuse_not_finite(0, 0, 0.5, ["a.jpg"])


def test_a_network_that_is_not_finite_is_not_written(tmp_path):
    net = torch.nn.BatchNorm2d(1)
    net.preprocessing, net.running_var[0] = IMAGENET, float("inf")
    with Run(config(tmp_path)) as run:
        line = refusal(run.stage, "1_supervised", lambda stage: stage.save(net, 3, [1.0]))
    assert line.startswith("1_supervised, epoch 3: weights or running statistics are not finite")
    assert not (tmp_path / "demo" / "1_supervised" / "checkpoint.pth").exists()


def test_checkpoints_of_a_run_elsewhere_are_the_same_bytes(tmp_path):
    net, files = torch.nn.BatchNorm2d(1), []
    net.preprocessing = IMAGENET
    for words in (["name=a", "workers=1"], ["name=b", "workers=2", "dataset.root=elsewhere"]):
        with Run(config(tmp_path, *words)) as run:
            folder = run.stage("1_supervised", lambda stage: stage.save(net, 3, [1.0]) or {})
        files.append((folder / "checkpoint.pth").read_bytes())
    assert files[0] == files[1]


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock; a child of it, as a worker is, outlives it by 1 s."""

    def hold(ready):
        with lock_folder(tmp_path):
            child = os.fork()
            if child:
                ready.set()
            time.sleep(60 if child else 1)
            os._exit(0)

    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(ready,))
    process.start()
    assert ready.wait(10)
    yield process
    process.kill()
    process.join()


def test_a_second_run_is_refused_with_the_holder(tmp_path, holder):
    assert refusal(lock_folder(tmp_path, patience=0.1).__enter__) == (
        f"{tmp_path / 'lock'}: another run works in this folder (pid {holder.pid} on "
        f"{platform.node()}); wait for it, stop it, or set name=... for another run"
    )


def test_the_lock_of_a_killed_run_becomes_free(tmp_path, holder):
    holder.kill()
    holder.join()
    with lock_folder(tmp_path):
        pass
    with lock_folder(tmp_path, patience=0.1):  # and so is one that was released
        pass


def test_table():
    crops = {"iterations": 5, "labeled_crops": 80, "unlabeled_crops": 0}
    stages = {
        "1_supervised": {"miou": 0.41234, "seconds": 61.4, **crops},
        "2_pseudo_label": {"images": 108, "confidence": 0.9, "seconds": 3.0},
    }
    head, *lines = stage_table(stages, "last").splitlines()
    assert head.split()[:3] == ["stage", "mIoU", "(last)"]
    assert " ".join(lines[0].split()) == "1_supervised 41.23 % 5 80 + 0 - - - - 1:01"
    assert lines[1].split() == ["2_pseudo_label", *"----", "108", "90.00", "%", "-", "0:03"]


def test_a_stage_that_patience_ended_is_named_below_the_table():
    crops = {"labeled_crops": 80, "unlabeled_crops": 0, "seconds": 1}
    stages = {
        "1_supervised": {"iterations": 8, "planned_iterations": 8, **crops},
        "4_retrain": {"iterations": 9, **crops},  # of an earlier version
        "6_retrain": {"iterations": 5, "planned_iterations": 8, **crops},
    }
    said = "6_retrain: stopped early at 5 of 8 iterations, by val"
    assert stage_table(stages, "last").splitlines()[4:] == [said]


def test_a_mean_over_some_of_the_classes_says_so():
    ious = {"ground": 0.9, "ball": None, "box": None}
    stages = {"1_supervised": {"miou": 0.9, "seconds": 1, "per_class_iou": ious}}
    said = (
        "1_supervised: mIoU over 1 of 3 classes ('ground'); others are neither labeled nor "
        "predicted"
    )
    assert stage_table(stages, "last").splitlines()[2:] == [said]
    assert describe_mean({"ground": 0.9, "ball": 0.0}) is None


def test_a_run_from_before_methods_were_named_is_refused_with_the_new_names(tmp_path):
    run_stages(config(tmp_path))
    kept = tmp_path / "demo" / "config.yaml"
    text = re.sub(r"(?m)^method: .*\n", "", kept.read_text())
    kept.write_text(text.replace("  weight: ones\n", "  weight: image\n") + "relabel: second\n")
    line = refusal(run_stages, config(tmp_path))
    assert "its method 'cisc' is called 'cisc_patch' now, and 'cisc_published' is called" in line
    assert "set name=... for another run, or start this one over with --from-stage 1" in line
    run_stages(config(tmp_path), from_stage=1)
