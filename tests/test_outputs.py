"""Where commands may write: nothing over what is read, a run's, or of another kind."""

import os
from pathlib import Path

import pytest
from conftest import refusal

from utils.outputs import Output, refuse_outputs

JSON = [".json"]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with a run, data and a checkpoint; the working folder."""
    for file in ("run/config.yaml", "run/lists.json", "run/eval.json", "data/val.txt", "b.pth"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer_to(path: str, suffixes: list[str] = JSON) -> str:
    inputs = {"dataset.root": Path("data"), "checkpoint": Path("b.pth")}
    return refusal(refuse_outputs, [Output("--out", Path(path), suffixes)], inputs)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("b.pth", "--out: b.pth would lie where checkpoint is read, b.pth"),
        ("data/new.json", "where dataset.root is read"),
        ("link/new.json", "where dataset.root is read"),
        ("run/config.yaml", "is of the run in "),
        ("run/results.json", "is of the run in "),  # not there yet
        ("run/1_supervised/new.json", "is of the run in "),
        ("other.pth", "is there and is no .json file"),
        ("run", "run is a folder; name a file .json"),
        ("b.pth/new.json", "where checkpoint is read"),
        ("~/new.json", "would be in a folder called ~"),
        ("notes/new.json", "notes is not a folder"),
    ],
)
def test_a_file_is_refused(place, path, told):
    (place / "link").symlink_to("data")
    (place / "other.pth").touch()
    (place / "notes").touch()
    assert told in answer_to(path)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (".", "would lie where dataset.root is read"),  # holds it
        ("data/masks", "would lie where dataset.root is read"),
        ("run/2_pseudo_label/masks", "is of the run in "),
        ("run/val", "is of the run in "),
        ("notes", "notes is a file; name a folder"),
    ],
)
def test_a_folder_is_refused(place, path, told):
    (place / "notes").touch()
    assert told in answer_to(path, [])


def test_a_place_that_is_closed_is_refused(place, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "run")
    assert "/run cannot be written to" in answer_to("run/below/new.json")


def test_other_places_are_free(place):
    (place / "circle").symlink_to("circle")
    for path in ("new.json", "deep/new.json", "run/eval.json", "run/new.json", os.devnull):
        refuse_outputs([Output("--json", Path(path), JSON)], {"checkpoint": place / "b.pth"})
    for path in ("masks", "run/masks", "data"):
        refuse_outputs([Output("--save-masks", Path(path))], {"checkpoint": place / "b.pth"})
    refuse_outputs([Output("--out", Path("report.html"), [".html"])], {"x": place / "circle"})
