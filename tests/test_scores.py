"""Scores image by image: boundaries, intervals, comparisons of checkpoints."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import refusal
from hypothesis import given
from hypothesis import strategies as st

import eval as eval_program
from model import Segmenter
from utils.scores import (
    Scores,
    as_markdown,
    blocks_of,
    boundary_overlap,
    compare_scores,
    group_images,
    lay_out_comparison,
    miou_interval,
    resample,
    sequence_of,
)


def test_boundary_by_hand():
    """8 x 8: the band is 1 pixel wide; what is beyond the image is another class."""
    label = torch.zeros(8, 8, dtype=torch.long)
    label[2:6, 2:6] = 1
    moved = label.roll(1, dims=1)
    square = 12  # of 16 pixels, without the inner 4
    around = 28 + 20  # of 48: the outer ring, and the ring around the square
    found = boundary_overlap(label, label, 3)
    assert found.tolist() == [[around, around], [square, square], [0, 0]]
    # Class 1, moved by a column: rows 2 and 5 share columns 3 to 5, rows 3 and 4 none but ...
    # true rim: columns 2 and 5 of rows 3 and 4; moved rim: columns 3 and 6 of these.
    both = 2 * 3
    assert boundary_overlap(moved, label, 3)[1].tolist() == [both, 2 * square - both]


def test_ignored_pixels_bound_a_class_and_count_nowhere():
    label = torch.zeros(9, 9, dtype=torch.long)
    label[:, 4:] = 255
    found = boundary_overlap(torch.ones_like(label), label, 2)
    rim = 9 * 4 - 7 * 2
    assert found.tolist() == [[0, rim], [0, rim]]
    other = torch.where(label == 255, 0, 1)
    assert torch.equal(boundary_overlap(other, label, 2), found)


@given(st.integers(0, 2**31), st.integers(3, 20), st.integers(3, 30))
def test_boundaries_of_every_class_agree_with_the_definition(seed, height, width):
    rng = np.random.default_rng(seed)
    label, ids = (torch.from_numpy(rng.integers(0, 3, (height, width))) for _ in range(2))
    distance = max(1, round(0.02 * math.hypot(height, width)))

    def bands(mask):
        padded = np.pad(mask, distance)
        side = 2 * distance + 1
        windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side))
        return mask & ~windows.all(axis=(2, 3))

    found = boundary_overlap(ids, label, 3)
    for name in range(3):
        one, other = bands(label.numpy() == name), bands(ids.numpy() == name)
        assert found[name].tolist() == [(one & other).sum(), (one | other).sum()]


@pytest.mark.parametrize(
    ("name", "video"),
    [
        ("JPEGImages/0016E5_08159.jpg", ("0016E5", 8159)),
        ("0006R0_f00930.png", ("0006R0", 930)),
        ("val/frankfurt/frankfurt_000000_000294_leftImg8bit.png", ("frankfurt_000000", 294)),
        ("JPEGImages/2007_000032.jpg", None),
        ("val2017/000000000139.jpg", None),
        ("JPEGImages/1000.jpg", None),
        ("ADE_val_00000001.jpg", None),
    ],
)
def test_names_that_tell_a_video(name, video):
    assert sequence_of(name) == video


def test_blocks_follow_the_frames_of_a_video():
    names = ["a1_0003.png", "x.png", "a1_0001.png", "a1_0002.png", "a1_0004.png"]
    blocks = blocks_of(names)  # four frames: blocks of two
    assert blocks.lengths.tolist() == [2, 1, 2, 2, 2]
    pairs = {names[i]: names[blocks.following[i, 1]] for i in (0, 2, 3, 4)}
    assert pairs == {
        **{"a1_0001.png": "a1_0002.png", "a1_0002.png": "a1_0003.png"},
        **{"a1_0003.png": "a1_0004.png", "a1_0004.png": "a1_0001.png"},
    }
    drawn = resample(blocks, 500)
    assert (drawn.sum(axis=1) == 5).all()
    assert np.allclose(drawn.mean(axis=0), 1, atol=0.15)


def test_images_of_their_own_are_drawn_independently():
    drawn = resample(blocks_of([f"{number}.png" for number in range(50)]), 4000)
    assert drawn.var(axis=0).mean() == pytest.approx(1 - 1 / 50, abs=0.03)  # multinomial
    again = resample(blocks_of([f"{number}.png" for number in range(50)]), 4000)
    assert np.array_equal(drawn, again)


def scores_of_shares(shares, names=None):
    """Scores of images of 1,000 pixels of one class, of which a share is right, and one other."""
    confusion = np.zeros((len(shares), 2, 2), np.int64)
    confusion[:, 0, 0] = np.round(1000 * np.asarray(shares))
    confusion[:, 0, 1] = 1000 - confusion[:, 0, 0]
    confusion[:, 1, 1] = 1000
    boundary = np.tile(np.array([[1, 2], [2, 4]]), (len(shares), 1, 1))
    return Scores(names or [f"{n}.png" for n in range(len(shares))], confusion, boundary)


def test_intervals_of_images_that_are_alike_have_no_width():
    scores = scores_of_shares([0.8] * 10)
    drawn = resample(blocks_of(scores.names))
    expected = (0.8 + 1000 / 1200) / 2
    assert miou_interval(scores.overlaps(), drawn) == pytest.approx((expected,) * 3)
    assert miou_interval(scores.overlaps(), drawn, scores.overlaps()) == (0, 0, 0)


def test_the_interval_is_that_of_the_normal_approximation():
    """mIoU is close to linear in the mean share here: its slope times the standard error."""
    rng = np.random.default_rng(0)
    shares = rng.normal(0.5, 0.05, 400).clip(0, 1)
    scores = scores_of_shares(shares)
    found = miou_interval(scores.overlaps(), resample(blocks_of(scores.names)))
    mean, step = shares.mean(), 1e-4
    slope = (1 / (2 - mean - step) - 1 / (2 - mean)) / step  # of the other class
    error = (1 + slope) / 2 * shares.std() / math.sqrt(len(shares))
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert found.low < found.value < found.high


def test_frames_of_a_video_have_a_wider_interval_than_independent_images():
    rng, noise = np.random.default_rng(1), []
    for step in rng.normal(0, 1, 400):
        noise.append(0.95 * (noise[-1] if noise else 0) + step)
    shares = (0.5 + 0.05 * np.array(noise)).clip(0, 1)
    widths = []
    for name in ("0001AB_{:05d}.png", "{}.png"):
        scores = scores_of_shares(shares, [name.format(number) for number in range(400)])
        found = miou_interval(scores.overlaps(), resample(blocks_of(scores.names)))
        widths.append(found.high - found.low)
    assert widths[0] > 2 * widths[1]


def test_differences_are_of_the_same_images():
    """Images differ much from one another, the networks by the same little on each."""
    shares = np.random.default_rng(2).uniform(0.1, 0.9, 100)
    found = compare_scores(
        {"a": scores_of_shares(shares), "b": scores_of_shares(shares + 0.05)}, "xy"
    )
    one, other = found["networks"]
    change = other["difference"]["miou"]
    assert change["value"] == pytest.approx(other["miou"]["value"] - one["miou"]["value"])
    assert 0 < change["low"] < change["high"] < 0.1
    assert change["high"] - change["low"] < (one["miou"]["high"] - one["miou"]["low"]) / 10
    assert other["boundary_iou"] == 0.5
    assert found["resamples"] == "95 % interval by 2,000 resamples of 100 images, seed 0"


def test_tables_by_hand():
    found = compare_scores(
        {"p/a.pth": scores_of_shares([0.5]), "b.pth": scores_of_shares([1.0])}, "xy"
    )
    rows = [line.split() for line in lay_out_comparison(found).splitlines()]
    assert rows[0] == ["A", "p/a.pth"]
    assert ["mIoU", "58.33", "100.00", "+41.67"] in rows
    assert ["x", "50.00", "100.00", "+50.00"] in rows
    assert ["boundary", "IoU", "50.00", "50.00", "+0.00"] in rows
    text = lay_out_comparison(found, markdown=True)
    assert "| mIoU | 58.33 | 100.00 | +41.67 |" in text
    assert "| x | 50.0 | 50.0 |" in text  # of A's confusion matrix
    assert as_markdown([["a|b", "c"], ["d", "1"]]).splitlines()[0] == "| a\\|b | c |"


SLICES = [f"images/patient0{n}_frame01_z0{z}.png" for n in (2, 1) for z in range(3)]


def test_images_are_grouped_by_what_is_found_in_their_names():
    groups = group_images(SLICES, r"patient\d+_frame\d+")
    assert groups == (["patient01_frame01", "patient02_frame01"], [1, 1, 1, 0, 0, 0])
    assert group_images(SLICES, None) is None
    told = refusal(group_images, [*SLICES, "other/a.png", "b.png"], r"patient\d+")
    assert told.startswith(
        "dataset.groups: 'patient\\d+' finds no group in the name of other/a.png "
    )
    assert "and 1 more images; change it, or set it to null" in told


def test_images_of_a_group_are_drawn_together():
    drawn = resample(blocks_of(SLICES, group_images(SLICES, r"patient\d+")), 500)
    assert (drawn[:, :3] == drawn[:, [0]]).all()
    assert (drawn[:, 3:] == drawn[:, [3]]).all()
    assert (drawn.sum(axis=1) == 6).all()
    assert drawn.mean() == pytest.approx(1)


def test_networks_are_compared_by_group():
    groups = group_images(SLICES, r"patient\d+")
    one = scores_of_shares([0.5] * 3 + [0.25] * 3, SLICES)
    two = scores_of_shares([1.0] * 3 + [0.25] * 3, SLICES)
    found = compare_scores({"a": one, "b": two}, "xy", groups=groups)
    assert "6 images in blocks of up to 3 images of a group" in found["resamples"]
    # Class y: 1,000 pixels are right; of class x 500, 750, and 0 and 750 are taken for it.
    first, second = (2 * 1000 / (2000 + wrong) for wrong in (500, 750))
    reports = found["networks"]
    assert reports[0]["by_group"]["dice"] == pytest.approx((first + second) / 2)
    change = (1 - first) / 2
    assert reports[1]["difference"]["by_group"]["dice"] == pytest.approx(change)
    rows = [line.split() for line in lay_out_comparison(found).splitlines()]
    assert ["Dice", "by", "group", "76.36", "86.36", "+10.00"] in rows
    assert ["y,", "Dice", "by", "group", "76.36", "86.36", "+10.00"] in rows


def test_means_over_other_classes_are_named():
    found = compare_scores({"a": scores_of_shares([0.5])}, "xy")
    assert "mIoU over" not in lay_out_comparison(found)
    found["networks"][0]["per_class_iou"]["y"] = None
    said = "A: mIoU over 1 of 2 classes ('x'); others are neither labeled nor predicted"
    for markdown in (False, True):
        assert said in lay_out_comparison(found, markdown).splitlines()


@pytest.mark.exhaustive
def test_checkpoints_are_compared_by_the_command_line(finished, tmp_path, run_program):
    run, _ = finished
    files = [run / stage / "checkpoint.pth" for stage in ("1_supervised", "6_retrain")]
    done = run_program("eval.py", *files, "--json", tmp_path / "c.json", "inference.batch_size=1")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "c.json").read_text())
    results = json.loads((run / "results.json").read_text())
    for network, stage in zip(found["networks"], ("1_supervised", "6_retrain"), strict=True):
        assert network["miou"]["value"] == pytest.approx(results["stages"][stage]["miou"], abs=1e-3)
        assert network["network"].endswith(f"{stage}/checkpoint.pth")
    assert "B - A" in done.stdout
    done = run_program("eval.py", files[1], "--markdown")
    assert done.returncode == 0, done.stderr
    assert "Confusion matrix of A" in done.stdout
    assert f"| mIoU | {100 * results['miou']:.2f} |" in done.stdout


@pytest.mark.slow
def test_what_cannot_be_compared_is_refused(finished, complaint, demo_root, tmp_path):
    run, _ = finished
    files = [run / stage / "checkpoint.pth" for stage in ("1_supervised", "6_retrain")]
    told = complaint(eval_program, *files, "--save-masks", tmp_path)
    assert "--save-masks and several checkpoints do not go together" in told
    assert "name a checkpoint" in complaint(eval_program, "inference.flip=true")
    Segmenter.load(files[0], classes=list("abcdefg")).save(tmp_path / "other.pth")
    words = [files[0], tmp_path / "other.pth", f"dataset.root={demo_root}"]
    assert "other.pth: has other classes than" in complaint(eval_program, *words)
    (tmp_path / "one.txt").write_text((demo_root / "val.txt").read_text().splitlines()[0])
    Segmenter.load(files[0], [f"dataset.val={tmp_path / 'one.txt'}"]).save(tmp_path / "less.pth")
    words = [files[0], tmp_path / "less.pth", f"dataset.root={demo_root}"]
    nets = {str(word): Segmenter.load(word, words[2:]) for word in words[:2]}
    assert "is validated on other images than" in refusal(eval_program.compare, nets)
