"""Studies: what is checked before any run."""

import pytest
import yaml
from conftest import refusal

from utils import study
from utils.run.stages import lock_folder


def test_lists_that_change_between_two_sittings_are_refused(demo_copy, tmp_path):
    """Else a mean would be over two validation lists."""
    rows, words = study.read_rows(["supervised", "cisc"]), [f"dataset.root={demo_copy}"]
    jobs = study.plan("demo.yaml", rows, [(0, 0)], [*words, f"outdir={tmp_path}"])
    folder = tmp_path / "demo_study"
    for _ in range(2):
        study.refuse_changed_lists(jobs, folder)
    (demo_copy / "truth.txt").write_text("")  # is only drawn
    study.refuse_changed_lists(jobs, folder)
    for name in ("test.txt", "val.txt"):
        with (demo_copy / name).open("a") as file:
            file.write("\n")
        line = refusal(study.refuse_changed_lists, jobs, folder)
        assert line.startswith(f"{demo_copy / name}: has changed since the study")
        (demo_copy / name).write_text((demo_copy / name).read_text()[:-1])


def test_runs_that_would_share_a_folder_are_refused(complaint, tmp_path):
    words = ("--config", "demo.yaml", f"outdir={tmp_path}", "--methods", "st++")
    assert "'st++' and 'st++' would both work in" in complaint(study, *words, "--seeds", "1,1")


def test_two_studies_in_one_folder_are_refused(complaint, demo_root, tmp_path):
    words = ("--config", "demo.yaml", f"outdir={tmp_path}", f"dataset.root={demo_root}")
    with lock_folder(tmp_path / "demo_study"):
        line = complaint(study, *words, "--methods", "st++")
    assert f"{tmp_path / 'demo_study' / 'lock'}: another run works in this folder (pid" in line


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xff", "holds no JSON ("),
        (b"[]", "holds no JSON object; delete it, and type the command again"),
        (b"{}", "miou: Field required; delete it"),
        (b'{"miou": null, "stages": {"1_supervised": {"seconds": 1}}}', "miou: Input should be"),
        (b'{"miou": 0.5, "stages": {}}', "stages: Dictionary should have at least 1 item"),
        (b'{"miou": 0.5, "stages": {"1_supervised": {}}}', "1_supervised.seconds: Field required"),
    ],
)
def test_damaged_results_are_named(tmp_path, content, told):
    (job,) = study.plan("demo.yaml", study.read_rows(["st++"]), [(0, 0)], [f"outdir={tmp_path}"])
    job.folder.mkdir(parents=True)
    (job.folder / "results.json").write_bytes(content)
    line = refusal(study.table, [job])
    assert line.startswith(f"{job.folder / 'results.json'}: ")
    assert told in line


def test_a_run_stopped_before_its_test_score_is_not_done(tmp_path):
    for test, done in (("test.txt", False), ("null", True)):
        words = [f"outdir={tmp_path / test}", f"dataset.test={test}"]
        (job,) = study.plan("demo.yaml", study.read_rows(["st++"]), [(0, 0)], words)
        job.folder.mkdir(parents=True)
        settings = job.config.model_dump(mode="json")
        (job.folder / "config.yaml").write_text(yaml.safe_dump(settings))
        (job.folder / "results.json").write_text('{"miou": 0.5}')
        assert study.is_done(job) == done
        (job.folder / "results.json").write_text('{"miou": 0.5, "test": {"miou": 0.4}}')
        assert study.is_done(job)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("results.txt", "results.txt is there and is no .md"),
        ("unpaired.md", "unpaired.md:1: <!-- study demo -->"),
        ("latin.md", "latin.md: cannot read this as UTF-8"),
        ("folder", "folder is a folder"),
    ],
)
def test_a_document_is_checked_before_any_run(complaint, tmp_path, monkeypatch, file, told):
    monkeypatch.setattr(study, "work", None)  # it would fail
    (tmp_path / "results.txt").touch()
    (tmp_path / "unpaired.md").write_text("<!-- study demo -->\n")
    (tmp_path / "latin.md").write_bytes(b"\xe9")
    (tmp_path / "folder").mkdir()
    words = ("--config", "demo.yaml", "--methods", "st++", f"outdir={tmp_path}")
    assert told in complaint(study, *words, "--write", tmp_path / file)
