"""Studies: what is checked before any run, and which run folders count as done."""

import json

import pytest
import yaml

from dataset.lists import read_splits
from utils import study


@pytest.fixture
def jobs(demo_copy, tmp_path):
    """Two runs that share stage 1, the first one finished with the lists of the demo set."""
    words = [f"outdir={tmp_path / 'out'}", f"dataset.root={demo_copy}"]
    rows = study.read_rows(["self_training", "fixmatch"])
    made = study.plan("demo.yaml", rows, [(0, 0)], words)
    folder, config = made[0].folder, made[0].config
    (folder / "1_supervised").mkdir(parents=True)
    for name in ("results.json", "1_supervised/stage.json", "environment.json"):
        (folder / name).write_text("{}")
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (folder / "lists.json").write_text(json.dumps(read_splits(config.dataset).digests()))
    return made


def test_a_run_of_other_lists_is_not_done(jobs, demo_copy):
    done, other = jobs
    assert study.is_done(done)
    val = (demo_copy / "val.txt").read_text().splitlines()
    (demo_copy / "val.txt").write_text("\n".join(val[1:]))
    assert not study.is_done(done)
    study.take_over(other, jobs)
    assert not other.folder.exists()
    (demo_copy / "val.txt").write_text("\n".join(val))
    study.take_over(other, jobs)
    assert (other.folder / "1_supervised" / "stage.json").is_file()
    for content in ("[]", "{}"):
        (done.folder / "lists.json").write_text(content)
        assert not study.is_done(done)


def test_runs_that_would_share_a_folder_are_refused(complaint, tmp_path):
    words = ("--config", "demo.yaml", f"outdir={tmp_path}", "--methods", "st++")
    assert "'st++' and 'st++' would both work in" in complaint(study, *words, "--seeds", "1,1")


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
