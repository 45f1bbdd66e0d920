"""Studies: which runs there are, what they share, and their table."""

import json
import os
import shutil
import signal
import sys
import time
from threading import Timer

import pytest
import yaml

from utils import study
from utils.config.reading import METHODS, read_config
from utils.errors import Stopped, UserError


@pytest.fixture
def jobs(tmp_path):
    methods = ["supervised", "self_training", "cisc_published"]
    return study.plan("demo.yaml", methods, [0, 1], [f"outdir={tmp_path}"])


def test_supervised_training_is_planned_at_three_lengths(jobs):
    assert len(jobs) == 2 * (3 + 1 + 1)
    lengths = [job.config.supervised.iterations for job in jobs[:8:2]]
    assert lengths == [lengths[0] * times for times in (1, 2, 4, 1)]
    assert len({job.folder for job in jobs}) == len(jobs)


def test_stage_1_is_shared_where_its_settings_agree(jobs):
    once, twice, _, self_training, published = (job.config for job in jobs[::2])
    assert study.share_stage_1(once, self_training)
    assert not study.share_stage_1(once, twice)
    assert not study.share_stage_1(once, jobs[1].config)  # another seed
    assert not study.share_stage_1(self_training, published)  # consistency
    other = read_config("demo.yaml", ["precision=bf16"], "self_training")
    assert not study.share_stage_1(self_training, other)
    stable = read_config("demo.yaml", [], "st++")
    assert not study.share_stage_1(once, stable)  # stage 1 keeps more checkpoints


def test_a_method_may_have_settings_of_its_own(tmp_path):
    method = "cisc stages=[1,2,6] pseudo_label.neighbours=false"
    (job,) = study.plan("demo.yaml", [method], [0], [f"outdir={tmp_path}"])
    assert job.row == method
    assert not job.config.pseudo_label.neighbours
    assert job.config.retrain.iterations == 2 * read_config("demo.yaml").retrain.iterations
    assert job.folder.name == "cisc-stages-1-2-6-pseudo_label.neighbours-false_0"
    assert job.log.name == f"{job.folder.name}.log"


def test_a_study_may_be_named(tmp_path):
    words = [f"outdir={tmp_path}", "name=small"]
    jobs = study.plan("demo.yaml", ["self_training", "cisc"], [0], words)
    names = ["self_training_0", "cisc_0"]
    assert [job.folder for job in jobs] == [tmp_path / "small_study" / name for name in names]


def test_the_table_compares_equal_seeds_with_the_best_supervised_row(jobs):
    for job in jobs:
        seed = job.config.seed
        miou = {"supervised": 0.5, "supervised x 2": 0.6 + seed / 50}.get(job.row, 0.5 + seed / 10)
        stage = {"seconds": 60, "labeled_crops": 7, "unlabeled_crops": 5, "teacher_crops": 3}
        job.folder.mkdir(parents=True)
        results = {"miou": miou, "stages": {"1_supervised": stage, "6_retrain": stage}}
        (job.folder / "results.json").write_text(json.dumps(results))
    lines = study.table(jobs).split("\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert rows[0][2] == "against supervised x 2"
    by_method = {row[0]: row[1:] for row in rows[2:]}
    assert by_method["supervised x 2"][:2] == ["61.0 ± 1.4", ""]
    # 50 and 60 against 60 and 62: -10 and -2
    assert by_method["self_training"] == ["55.0 ± 7.1", "-6.0 ± 5.7", "2.0", "14", "10", "6"]


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


def test_stages_of_other_settings_are_not_taken_over(tmp_path):
    """A folder of an earlier study with another learning rate is no source."""
    words = [f"outdir={tmp_path}"]
    old = study.plan("demo.yaml", ["supervised"], [0], [*words, "optimizer.lr=0.1"])[0]
    (old.folder / "1_supervised").mkdir(parents=True)
    (old.folder / "1_supervised" / "stage.json").write_text("{}")
    for name in ("lists.json", "environment.json"):
        (old.folder / name).write_text("{}")
    (old.folder / "metrics.jsonl").touch()

    def taken(settings):
        (old.folder / "config.yaml").write_text(yaml.safe_dump(old.config.model_dump(mode="json")))
        jobs = study.plan("demo.yaml", ["supervised", "self_training"], [0], settings)
        study.take_over(jobs[-1], jobs)
        return (jobs[-1].folder / "1_supervised" / "stage.json").is_file()

    assert not taken(words)
    assert taken([*words, "optimizer.lr=0.1"])


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
    jobs = study.plan("demo.yaml", ["self_training", "fixmatch"], [0], words)
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
    jobs = study.plan("demo.yaml", ["supervised"], [0], [f"outdir={tmp_path}", "dataset.root=none"])
    with pytest.raises(UserError, match=r"1 runs failed: see .*supervised_0\.log"):
        study.work(jobs[:1], 1)
    assert "none" in (jobs[0].log).read_text()
