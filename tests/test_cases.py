"""Small inputs that users bring: each trains, or ends in the one line that helps."""

import shlex

import pytest
import yaml
from conftest import SHARED, refusal

from dataset.lists import read_splits
from dataset.splits.check import audit
from utils.config.reading import config_from

CASES = SHARED / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/cases")
TWO = '"dataset.class_map={0: background, 255: object}" "dataset.ignore=[]"'


def config(case, *words):
    values = yaml.safe_load((CASES / "tiny.yaml").read_text())
    del values["pseudo_label"]["neighbour_scales"]  # as it was called
    return config_from(values, "tiny.yaml", [f"dataset.root={CASES / case}", *words])


def read(case, *words):
    return read_splits(config(case, *words).dataset)


def problems(case, *words):
    return [each["example"] for each in audit(config(case, *words))["problems"]]


def advised(line, start):
    """The settings that a line advises, as a shell splits them, from a word on."""
    return shlex.split(line[line.index(start) :].partition("; else")[0])


@pytest.mark.parametrize("case", ["base", "base12", "base_more"])
def test_what_is_right_is_read_without_a_note(case):
    notes = []
    read_splits(config(case).dataset, note=notes.append)
    assert notes == problems(case) == []


def test_an_object_of_255_is_not_ignored_silently():
    for words in (["dataset.classes=[background,object]"], []):
        line = refusal(read, "bin255", *words)
        assert line.startswith("dataset.labeled: its masks show id 0 and, ignored, 255 (")
        assert f"if 255 is a class, set {'' if words else 'dataset.kind=custom '}" in line
        assert line.endswith(f"{TWO}; else name masks of more than one class")
        assert problems("bin255", *words)[0] == line
        fix = advised(line, '"dataset.class_map' if words else "dataset.kind")
        assert problems("bin255", *words, *fix) == []
        classes = audit(config("bin255", *fix, *words))["classes"]
        shown = {row["name"]: row["share"] for row in classes}
        assert shown.keys() == {"background", "object"}
        assert 0 < shown["object"] < shown["background"]


def test_a_class_that_no_labeled_image_shows_is_named():
    line = refusal(read, "absent_lab")
    assert line.startswith("dataset.labeled: no labeled image shows 'box'; label one that does, or")
    assert problems("absent_lab") == [line]
    assert audit(config("absent_lab"))["unreachable"] == []
    notes = []
    settings = config("absent_lab", *advised(line, '"dataset.classes'))
    assert len(read_splits(settings.dataset, note=notes.append).labeled) == 4
    assert notes == ["dataset.val: 6.2% of the pixels are ignored, id 2"]
