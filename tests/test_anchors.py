"""What stage 3 keeps, and its files."""

import csv
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.lists import Sample
from model.cisc.anchors import (
    keep_reliable_partners,
    read_selection,
    split_by_reliability,
    write_partners,
    write_selection,
)

SCORES = st.dictionaries(st.text("abcd", min_size=1), st.sampled_from([-2.0, -1.0, 0.0, -math.inf]))


def test_higher_is_reliable_and_ties_go_by_name():
    scores = {"d": -1.0, "b": -3.0, "a": -3.0, "c": -0.5}
    assert split_by_reliability(scores, 0.5) == (["c", "d"], ["a", "b"])


@pytest.mark.parametrize(
    ("count", "keep", "kept"),
    [
        *[(1, 0.5, 1), (3, 0.5, 2), (4, 0.5, 2), (5, 0.2, 1), (4, 1.0, 4)],
        # 100 * 0.07 is 7.000000000000001 in floating point; the share is 7 images, not 8.
        *[(100, 0.07, 7), (100, 0.29, 29), (10, 0.7, 7), (1000, 0.007, 7)],
    ],
)
def test_share_is_rounded_up(count, keep, kept):
    scores = {str(i): float(i) for i in range(count)}
    assert len(split_by_reliability(scores, keep)[0]) == kept


@given(SCORES, st.floats(0.01, 1))
def test_halves_part_the_images_whatever_their_order(scores, keep):
    reliable, unreliable = split_by_reliability(scores, keep)
    assert sorted(reliable + unreliable) == sorted(scores)
    assert all(scores[r] >= scores[u] for r in reliable for u in unreliable)
    backwards = dict(reversed(scores.items()))
    assert split_by_reliability(backwards, keep) == (reliable, unreliable)


def test_only_partner_of_a_rare_class_stays():
    index = {1: ["a", "b", "c"], 4: ["b"]}
    scores = {(1, "a"): -3.0, (1, "b"): -1.0, (1, "c"): -2.0, (4, "b"): -9.0}
    assert keep_reliable_partners(index, scores, 0.5) == {1: ["b", "c"], 4: ["b"]}


def test_selection_survives_its_files(tmp_path):
    names = ["x/1.jpg", "x/2.jpg", "x/3.jpg"]
    unlabeled = [Sample(name, Path("root") / name, None) for name in names]
    images = {"x/1.jpg": -math.inf, "x/2.jpg": -0.25, "x/3.jpg": -0.5}
    partners = {(0, "a"): -0.5, (2, "a"): -0.1, (2, "b"): -0.2}
    classes = "sky", "road", "traffic, light"
    assert write_selection(tmp_path, images, 0.5) == 2
    assert read_selection(tmp_path, unlabeled, classes).index is None  # none are queried
    write_partners(tmp_path, {2: ["a"]}, partners, classes)
    selection = read_selection(tmp_path, unlabeled, classes)
    assert selection.reliable == [unlabeled[1], unlabeled[2]]
    assert selection.unreliable == [unlabeled[0]]
    assert selection.index == {2: ["a"]}
    with (tmp_path / "unlabeled_scores.csv").open(newline="") as table:
        rows = {row["image"]: float(row["reliability"]) for row in csv.DictReader(table)}
    assert rows == images
    with (tmp_path / "labeled_scores.csv").open(newline="") as table:
        assert next(row for row in csv.DictReader(table) if row["image"] == "b") == {
            "class": "traffic, light",
            "image": "b",
            "reliability": "-0.2",
        }
