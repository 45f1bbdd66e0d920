"""What labeling keeps of each image for ``dataset.splits suggest``."""

import csv
import json

import numpy as np
import pytest
import torch

from model.cisc.doubt import (
    doubt_by_class,
    encode,
    summarize,
    write_features,
    write_summaries,
)
from model.cisc.pseudo_labels import Opinions


def maps(*rows):
    """One image of two pixels: the probability of the second of two classes at each."""
    second = torch.tensor(rows).view(1, 1, 1, -1)
    return torch.cat([1 - second, second], dim=1)


def test_doubt_is_how_far_teacher_and_votes_differ():
    opinions = Opinions(maps(0.9, 0.2), maps(0.5, 0.2), maps(0.8, 0.1), torch.ones(1, 2))
    assert doubt_by_class(opinions).tolist() == [pytest.approx([0.2, 0.2])]


def test_without_votes_it_is_how_far_a_class_drawn_by_the_teacher_would_differ():
    teacher = maps(0.5, 1.0)
    assert doubt_by_class(Opinions(teacher, None, teacher, torch.ones(1, 2))).tolist() == [
        [0.25, 0.25]
    ]


def test_summaries_are_kept_as_json_and_written_for_all_images(tmp_path):
    both, features = maps(0.75, 0.5), torch.tensor([[3.0, 4.0]])
    (one,) = summarize(Opinions(maps(0.9, 0.2), maps(0.5, 0.2), both, features))
    one = json.loads(json.dumps(one))
    report = write_summaries(tmp_path, ["ground", "dog"], {"b.jpg": one, "a.jpg": one})
    assert report == {"images": 2, "confidence": 0.625}
    with (tmp_path / "doubt.csv").open() as file:
        assert [*csv.reader(file)] == [
            ["image", "ground", "dog"],
            ["b.jpg", "0.2", "0.2"],
            ["a.jpg", "0.2", "0.2"],
        ]
    write_features(tmp_path, {"b.jpg": one["features"], "a.jpg": encode(features)[0]})
    with np.load(tmp_path / "features.npz") as found:
        assert found["images"].tolist() == ["b.jpg", "a.jpg"]
        assert found["features"].dtype == np.float16
        assert found["features"][0].tolist() == pytest.approx([0.6, 0.8], abs=1e-3)


def test_the_same_features_are_the_same_bytes(tmp_path):
    (one,) = encode(torch.tensor([[3.0, 4.0]]))
    for name in ("x", "y"):
        write_features(tmp_path / name, {"a.jpg": one})
    assert (tmp_path / "x/features.npz").read_bytes() == (tmp_path / "y/features.npz").read_bytes()
