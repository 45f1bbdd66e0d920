"""Studies: which runs there are, what they share, and their table."""

import json
import os
import shutil
import signal
import sys
import time
from itertools import pairwise
from threading import Timer

import pytest
import yaml
from conftest import refusal

from dataset.lists import read_splits
from utils import study
from utils.config.reading import METHODS, flatten, read_config
from utils.errors import Stopped, UserError


def plan(methods, words, draws=((0, 0),), config="demo.yaml"):
    return study.plan(config, study.read_rows(methods), draws, words)


@pytest.fixture
def jobs(tmp_path):
    methods = ["supervised", "self_training", "cisc tried=4"]
    return plan(methods, [f"outdir={tmp_path}"], [(0, 0), (1, 0)])


def test_supervised_training_is_planned_at_three_lengths(jobs):
    assert len(jobs) == 2 * (3 + 1 + 1)
    lengths = [job.config.supervised.iterations for job in jobs[:8:2]]
    assert lengths == [lengths[0] * times for times in (1, 2, 4, 1)]
    assert len({job.folder for job in jobs}) == len(jobs)


def test_stage_1_is_shared_where_its_settings_agree(jobs):
    once, twice, _, self_training, paper = (job.config for job in jobs[::2])
    assert study.share_stage_1(once, self_training)
    assert not study.share_stage_1(once, twice)
    assert not study.share_stage_1(once, jobs[1].config)  # another seed
    assert not study.share_stage_1(self_training, paper)  # consistency
    other = read_config("demo.yaml", ["precision=bf16"], "self_training")
    assert not study.share_stage_1(self_training, other)
    stable = read_config("demo.yaml", [], "st++")
    assert not study.share_stage_1(once, stable)  # stage 1 keeps more checkpoints


def test_a_method_may_have_settings_of_its_own(tmp_path):
    method = "cisc_patch stages=[1,2,6] pseudo_label.neighbours=false"
    (job,) = plan([f"{method} tried=3"], [f"outdir={tmp_path}"])
    assert (job.row.title, job.row.tried) == (method, 3)
    assert not job.config.pseudo_label.neighbours
    assert job.config.retrain.iterations == 2 * read_config("demo.yaml").retrain.iterations
    assert job.folder.name == "cisc_patch-stages-1-2-6-pseudo_label.neighbours-false_0"
    assert job.log.name == f"{job.folder.name}.log"


def test_the_ladder_changes_one_thing_a_row_from_the_paper_to_ours(tmp_path):
    """Every row trains as many iterations on as many crops; the last one is ``cisc_patch``."""
    rows = [flatten(job.config.model_dump()) for job in plan(["ladder"], [f"outdir={tmp_path}"])]
    changes = [
        {key for key in row if row[key] != before[key]} - {"name"} for before, row in pairwise(rows)
    ]
    assert changes == [
        {"retrain.start"},
        {"retrain.mix"},
        {"pseudo_label.threshold"},
        {"retrain.weight"},
        {"method", "supervised.consistency"},
        {"pseudo_label.neighbours"},
    ]
    assert rows[0] | {"name": ""} == plain("cisc", tmp_path)
    assert rows[-1] | {"name": ""} == plain("cisc_patch", tmp_path)


def plain(method, outdir):
    config = read_config("demo.yaml", [f"outdir={outdir / 'demo_study'}"], method)
    return flatten(config.model_dump()) | {"name": ""}


def test_a_study_may_be_named(tmp_path):
    jobs = plan(["self_training", "cisc"], [f"outdir={tmp_path}", "name=small"])
    names = ["self_training_0", "cisc_0"]
    assert [job.folder for job in jobs] == [tmp_path / "small_study" / name for name in names]


def test_labeled_lists_of_the_same_size_are_drawn_from_images_with_masks(demo_root, tmp_path):
    words = [f"outdir={tmp_path}", f"dataset.root={demo_root}"]
    one, two = plan(["cisc_patch"], words, [(0, 0), (0, 1)])
    assert two.folder.name == "cisc_patch_0_list1"
    for number in (1, 2):
        study.draw_lists(one.config, number, tmp_path / "demo_study" / "lists" / str(number))
    ours, drawn = (read_splits(job.config.dataset) for job in (one, two))  # without a fault
    assert len(drawn.labeled) == len(ours.labeled) == 6
    assert {x.name for x in (*drawn.labeled, *drawn.unlabeled)} == {
        x.name for x in (*ours.labeled, *ours.unlabeled)
    }
    lists = [(tmp_path / "demo_study" / "lists" / n / "labeled.txt").read_text() for n in "12"]
    assert lists[0] != lists[1]
    few = read_config("demo.yaml", [*words, f"panels.truth={tmp_path / 'few.txt'}"])
    (tmp_path / "few.txt").write_text((demo_root / "truth.txt").read_text().split("\n")[0])
    assert "do not list the same images" in refusal(study.draw_lists, few, 1, tmp_path)
    bare = read_config("demo.yaml", [*words, "panels.truth=null"])
    assert "set panels.truth=LIST" in refusal(study.draw_lists, bare, 1, tmp_path)
    gone = read_config("demo.yaml", [*words, "panels.truth=gone.txt"])
    assert "gone.txt: cannot read this as UTF-8 text" in refusal(
        study.draw_lists, gone, 1, tmp_path
    )


def test_drawn_lists_keep_groups_together_and_names_with_spaces(tmp_path):
    slices = [f'"a b/patient{n // 9}_z{n % 9}.png"' for n in range(54)]
    lines = [f"{image} {image.replace('a b', 'masks')}" for image in slices]
    for name, part in (("labeled", lines[:18]), ("unlabeled", slices[18:]), ("truth", lines[18:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(part))
    words = ["dataset.kind=custom", "dataset.classes=[a,b]", "panels.truth=truth.txt"]
    words += [f"dataset.root={tmp_path}", r"dataset.groups=patient\d+", "dataset.split=null"]
    study.draw_lists(read_config("pascal.yaml", words), 1, tmp_path / "drawn")
    labeled = (tmp_path / "drawn/labeled.txt").read_text().splitlines()
    unlabeled = (tmp_path / "drawn/unlabeled.txt").read_text().splitlines()
    assert len(labeled) == 18
    assert len({line.split("_z")[0] for line in labeled}) == 2
    assert {*labeled} <= {*lines}
    assert len(labeled) + len(unlabeled) == 54
    assert {*unlabeled} < {*slices}
    assert len(unlabeled) == 36


def test_the_table_compares_equal_seeds_with_the_best_supervised_row(jobs):
    for job in jobs:
        seed, title = job.config.seed, job.row.title
        miou = {"supervised": 0.5, "supervised x 2": 0.6 + seed / 50}.get(title, 0.5 + seed / 10)
        stage = {"seconds": 60, "labeled_crops": 7, "unlabeled_crops": 5, "teacher_crops": 3}
        last = {**stage, "best_miou": miou + 0.01}
        job.folder.mkdir(parents=True)
        results = {"miou": miou, "stages": {"1_supervised": stage, "6_retrain": last}}
        if title == "cisc":
            results["test"] = {"miou": 0.25}
        (job.folder / "results.json").write_text(json.dumps(results))
    lines = study.table(jobs).split("\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    counts = ["labeled crops", "unlabeled crops", "seconds", "tried"]
    head = ["mIoU", "against supervised x 2", "best on val", "test", "start", *counts]
    assert rows[0] == ["method", *head]
    by_method = {row[0]: row[1:] for row in rows[2:]}
    assert by_method["supervised x 2"][:2] == ["61.0 ± 1.4", ""]
    # 50 and 60 against 60 and 62: -10 and -2
    own = ["55.0 ± 7.1", "-6.0 ± 5.7", "56.0 ± 7.1", "", "encoder", "14", "10", "120", "1"]
    assert by_method["self_training"] == own
    assert by_method["cisc"][3:] == ["25.0 ± 0.0", "encoder", "14", "10", "120", "4"]


def test_means_and_stages_that_are_not_whole_are_named_below_the_table(tmp_path):
    jobs = plan(["self_training"], [f"outdir={tmp_path}"], [(0, 0), (1, 0)])
    for job in jobs:
        done = 40 + 20 * job.config.seed
        stage = {"seconds": 60, "iterations": done, "planned_iterations": 60}
        stage |= {"labeled_crops": done, "unlabeled_crops": 0}
        results = {"name": job.config.name, "miou": 0.5, "stages": {"1_supervised": stage}}
        results["per_class_iou"] = {"ground": 0.5, "box": None}
        job.folder.mkdir(parents=True)
        (job.folder / "results.json").write_text(json.dumps(results))
    *rows, empty, remarks = study.table(jobs).splitlines()
    assert rows[-1].split("|")[7].strip() == "50"  # labeled crops, the mean
    assert empty == ""
    assert remarks == (
        "mIoU over 1 of 2 classes ('ground'); others are neither labeled nor predicted. "
        "self_training_0, 1_supervised: stopped early at 40 of 60 iterations, by val."
    )


def test_the_table_has_dice_by_group_where_runs_have_it(jobs):
    for job in jobs:
        job.folder.mkdir(parents=True)
        results = {"miou": 0.5, "stages": {"1_supervised": {"seconds": 60}}}
        if job.row.title == "cisc":
            dice = {"by_group": {"dice": 0.8 + job.config.seed / 10}}
            results |= {**dice, "test": {"miou": 0.5, "by_group": {"dice": 0.25}}}
        (job.folder / "results.json").write_text(json.dumps(results))
    lines = study.table(jobs).split("\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0][4:8] == ["test", "Dice by group", "test Dice by group", "start"]
    assert {len(row) for row in rows} == {12}
    by_method = {row[0]: row[5:7] for row in rows[2:]}
    assert by_method["cisc"] == ["85.0 ± 7.1", "25.0 ± 0.0"]
    assert by_method["self_training"] == ["", ""]


def test_a_section_of_a_document_is_replaced(tmp_path):
    file = tmp_path / "results.md"
    file.write_text("# Results\n")
    for text in ("## demo\n\nold\n", "## demo\n\nnew\n"):
        study.put_section(file, "demo", text)
        study.put_section(file, "other", "## other\n")
    content = file.read_text()
    assert content.startswith("# Results\n")
    assert content.count("new") == content.count("## other") == 1
    assert "old" not in content


def test_stages_of_other_settings_are_not_taken_over(tmp_path, demo_root):
    """A folder of an earlier study with another learning rate is no source."""
    words = [f"outdir={tmp_path}", f"dataset.root={demo_root}", "dataset.test=null"]
    old = plan(["supervised"], [*words, "optimizer.lr=0.1"])[0]
    (old.folder / "1_supervised").mkdir(parents=True)
    (old.folder / "1_supervised" / "stage.json").write_text("{}")
    (old.folder / "environment.json").write_text("{}")
    lists = read_splits(old.config.dataset).digests()
    (old.folder / "lists.json").write_text(json.dumps(lists))
    (old.folder / "metrics.jsonl").touch()

    def taken(settings):
        (old.folder / "config.yaml").write_text(yaml.safe_dump(old.config.model_dump(mode="json")))
        jobs = plan(["supervised", "self_training"], settings)
        study.take_over(jobs[-1], jobs)
        return (jobs[-1].folder / "1_supervised" / "stage.json").is_file()

    assert not taken(words)
    assert taken([*words, "optimizer.lr=0.1"])


def test_folds_are_taken_over_though_supervised_training_comes_first(tmp_path, demo_root):
    words = [f"outdir={tmp_path}", f"dataset.root={demo_root}", "dataset.test=null"]
    jobs = plan(["supervised", "cisc_patch", "cisc_patch pseudo_label.adjustment=0.5"], words)
    *others, last = jobs
    for job, stages in ((others[0], [study.STAGE]), (others[-1], [study.STAGE, *study.FOLDS])):
        for name in stages:
            (job.folder / name).mkdir(parents=True)
            (job.folder / name / "stage.json").write_text("{}")
        (job.folder / "config.yaml").write_text(yaml.safe_dump(job.config.model_dump(mode="json")))
        for name in ("environment.json", "lists.json"):
            (job.folder / name).write_text("{}")
    study.take_over(last, jobs)
    there = sorted(path.parent.name for path in last.folder.glob("*/stage.json"))
    assert there == sorted([study.STAGE, *study.FOLDS])


def test_wrong_words_are_refused(complaint):
    words = ("--config", "demo.yaml", "--methods")
    assert "'magic' is not one of" in complaint(study, *words, "magic")
    assert "pseudo_label.neighbors" in complaint(study, *words, "cisc pseudo_label.neighbors=1")
    assert "numbers" in complaint(study, *words, "supervised", "--seeds", "a")
    assert "use --seeds" in complaint(study, *words, "supervised", "seed=5")
    assert "use --seeds" in complaint(study, *words, "cisc seed=5")
    assert "study names its runs" in complaint(study, *words, "cisc name=other")
    assert "'' is not one of" in complaint(study, *words, "cisc,")
    assert "twice" in complaint(study, *words, "cisc,cisc")
    assert "below 1" in complaint(study, *words, "supervised", "--processes", "0")
    assert "below 1" in complaint(study, *words, "supervised", "--lists", "0")
    assert "tried=N counts" in complaint(study, *words, "cisc tried=many")
    assert "tried=N counts" in complaint(study, *words, "cisc tried=0")
    assert "twice" in complaint(study, *words, "ladder,cisc_patch")


@pytest.mark.exhaustive
def test_every_method_runs_and_the_study_continues(demo_root, tmp_path, tiny_settings, monkeypatch):
    """All methods in one study; then stage 1 is shared, and what is deleted is done again."""
    settings = [*tiny_settings(demo_root, tmp_path), "supervised.epochs=1", "retrain.epochs=1"]
    command = ["study", "--config", "demo.yaml", "--methods", ",".join(METHODS), "--seeds", "3"]
    document = tmp_path / "results.md"
    monkeypatch.setattr(sys, "argv", [*command, "--write", str(document), *settings])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    study.main()
    folder = tmp_path / "demo_study"
    for method in METHODS:
        results = json.loads((folder / f"{method}_3" / "results.json").read_text())
        assert f"| {method} | {100 * results['miou']:.1f} |" in document.read_text()
    first = folder / "supervised_3" / "1_supervised" / "checkpoint.pth"
    for method in ("self_training", "fixmatch", "unimatch"):
        copied = folder / f"{method}_3" / "1_supervised" / "checkpoint.pth"
        assert copied.read_bytes() == first.read_bytes()
    stability = (folder / "st++_3" / "3_select" / "unlabeled_scores.csv").read_text().split()[1:]
    assert all(0 <= float(row.split(",")[1]) <= 2 for row in stability)
    shutil.rmtree(folder / "fixmatch_3")
    done = (folder / "unimatch_3" / "results.json").stat().st_mtime_ns
    study.main()
    assert (folder / "fixmatch_3" / "results.json").is_file()
    assert (folder / "unimatch_3" / "results.json").stat().st_mtime_ns == done


def test_a_signal_ends_the_runs_and_starts_no_other(tmp_path, monkeypatch):
    """Two runs that share stage 1: the second waits for the first, which the signal ends."""
    program = tmp_path / "train.py"
    program.write_text("import time\nprint('started', flush=True)\ntime.sleep(600)\n")
    monkeypatch.setattr(study, "TRAIN", program)
    words = [f"outdir={tmp_path}"]
    jobs = plan(["self_training", "fixmatch"], words)
    Timer(3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    before = signal.signal(signal.SIGTERM, study._stop)
    begin = time.monotonic()
    with pytest.raises(Stopped):
        study.work(jobs, 2)
    signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - begin < 60
    assert [job.log.read_text() for job in jobs] == ["started\n", ""]


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_log(tmp_path):
    jobs = plan(["supervised"], [f"outdir={tmp_path}", "dataset.root=none"])
    with pytest.raises(UserError, match=r"1 runs failed: see .*supervised_0\.log"):
        study.work(jobs[:1], 1)
    assert "none" in (jobs[0].log).read_text()
