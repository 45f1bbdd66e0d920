"""New labels in the lists of a run, and the whole way from suggestions to the next round."""

import json

import pytest
import yaml
from conftest import refusal

import train as train_program
import utils.report.__main__ as report_program
from dataset.splits import __main__ as program
from model import fitting


@pytest.fixture
def run(tmp_path, demo_root):
    """A folder with the config of a run on the demo set, and a list of two new labels."""
    folder = tmp_path / "out" / "mine"
    folder.mkdir(parents=True)
    dataset = {"kind": "demo", "root": str(demo_root)}
    config = {"name": "mine", "dataset": dataset, "augment": {"base_size": 64, "crop_size": 48}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    new = tmp_path / "new.txt"
    new.write_text("".join((demo_root / "truth.txt").open().readlines()[2:4]))
    return folder, new


def test_lists_with_new_labels(run, answer, demo_root, tmp_path):
    folder, new = run
    out = tmp_path / "lists"
    said = answer(program, "extend", folder, "--labels", new, "--out", out)
    assert said[:2] == [
        f"{out}/labeled.txt: 6 images and 2 new ones",
        f"{out}/unlabeled.txt: 8 images, without 2 that have labels now",
    ]
    keys = f"dataset.labeled={out}/labeled.txt dataset.unlabeled={out}/unlabeled.txt"
    assert said[-1].strip() == f"{keys} supervised.start=last"
    labeled = (demo_root / "labeled.txt").read_text() + new.read_text()
    assert (out / "labeled.txt").read_text() == labeled
    taken = {line.split()[0] for line in new.open()}
    images = (demo_root / "unlabeled.txt").read_text().split()
    assert (out / "unlabeled.txt").read_text().split() == [x for x in images if x not in taken]


def test_labels_that_cannot_be_added(run, answer, demo_root, tmp_path):
    folder, new = run

    def refused(lines):
        new.write_text("".join(lines))
        return refusal(answer, program, "extend", folder, "--labels", new, "--out", tmp_path / "x")

    lines = (demo_root / "truth.txt").open().readlines()
    assert f"{lines[0].split()[0]} has no mask" in refused([lines[0].split()[0]])
    labeled = (demo_root / "labeled.txt").open().readlines()[0]
    assert "is in dataset.labeled already; take it off here" in refused([labeled])
    val = (demo_root / "val.txt").open().readlines()[0]
    assert "is in dataset.val already" in refused([val])
    assert "labels every image of dataset.unlabeled" in refused(lines)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_run_goes_on_with_the_labels_that_it_suggests(
    answer, demo_root, tmp_path, tiny_settings, monkeypatch
):
    words = ["--config", "demo.yaml", "--method", "self_training", "name=loop"]
    words += [*tiny_settings(demo_root, tmp_path)[:-1], "pseudo_label.scales=[1.0]"]
    words += ["evaluate.every=9", "panels.images=0", "supervised.epochs=1", "retrain.epochs=1"]
    run, lists, new = tmp_path / "loop", tmp_path / "lists", tmp_path / "new.txt"
    answer(train_program, *words)
    before = (run / "results.json").read_bytes()
    said = answer(program, "suggest", run, "--count", "2")
    assert " are most like it" in said[1]
    chosen = (run / "suggested/list.txt").read_text().split()
    truth = (demo_root / "truth.txt").open()
    new.write_text("".join(line for line in truth if line.split()[0] in chosen))
    *_, keys = answer(program, "extend", run, "--labels", new, "--out", lists)
    words += keys.split()

    def interrupted(self, report):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fitting.Progress, "epoch_done", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer(train_program, *words)
    said = "\n".join(answer(train_program, *words))
    former = "rounds/1/6_retrain/checkpoint.pth"
    assert f"all weights of {run / former}" in said
    assert (run / "rounds/1/results.json").read_bytes() == before
    first = json.loads((run / "results.json").read_text())["stages"]["1_supervised"]
    assert (first["labeled_images"], first["started_from"]) == (8, former)
    assert (run / "rounds/1/suggested/list.txt").is_file()
    answer(program, "suggest", run, "--count", "2")  # the next two
    assert not {*(run / "suggested/list.txt").read_text().split()} & {*chosen}
    answer(report_program, run)
    page = (run / "report.html").read_text()
    assert "How much do more labels help?" in page
    assert "<td>loop</td><td>1</td><td>6</td><td>6_retrain</td>" in page
    assert "<td>loop</td><td>2</td><td>8</td><td>6_retrain</td>" in page
