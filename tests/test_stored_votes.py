"""Votes that stage 2 stores, cut by training views, and runs that label by them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refusal, same
from PIL import Image
from torch.utils.data import default_collate

import train
from dataset.lists import Sample
from dataset.loader import RandomStreams, SampleKey
from dataset.training import RetrainSamples
from dataset.transforms import CropParams, random_view
from dataset.votes import CropVotes, NoVotes, cut_votes, votes_file, write_votes
from model import fitting
from model.ops.bilinear import resize
from utils.checkpoint import load
from utils.config.reading import read_config
from utils.config.schema import AugmentSection

SAMPLE = Sample("photos/a.jpg", Path("a.jpg"), None)
TURNS = {"vertical": True, "quarter_turns": True, "rotate": 180.0}


@pytest.fixture
def stored(tmp_path):
    """Store log ratios of a picture of 60 x 90 pixels; return them, and the folder."""
    torch.manual_seed(0)
    maps = torch.randn(3, 4, 6).half()
    write_votes(votes_file(tmp_path, SAMPLE), maps.numpy())
    return maps.float(), tmp_path


@pytest.mark.parametrize("turns", [{}, {"vertical": True, "quarter_turns": True}, TURNS])
@pytest.mark.parametrize("crop", [32, 50, 120])
def test_stored_votes_are_cut_as_those_at_full_resolution(stored, turns, crop):
    maps, folder = stored
    full = resize(maps.unsqueeze(0), (60, 90))[0].numpy()
    augment = AugmentSection(base_size=100, scale=(0.8, 1.5), crop_size=crop, **turns)
    rng = np.random.default_rng(0)
    for _ in range(20):
        view = random_view((60, 90), augment, rng)
        votes = cut_votes(folder, SAMPLE, view)
        assert votes.log_ratio.dtype == torch.float16
        found = resize(votes.log_ratio.float().unsqueeze(0), (crop, crop), True)[0]
        expected = np.stack([view.image(Image.fromarray(channel)) for channel in full])
        padding = np.asarray(view.mask(Image.new("L", (90, 60)))) == 255
        assert np.array_equal(~votes.shown, padding)
        error = np.abs(found.numpy() - expected).max(axis=0)[~padding]
        assert np.quantile(error, 0.95) < 0.2  # at bends; the ratios' own spread is 1
        assert np.median(error) < 0.05


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("vertical", [False, True])
@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("scaled", [(40, 60), (8, 20)])
def test_places_of_mirrored_and_turned_views_are_exact(flip, vertical, quarters, scaled):
    """The pixels of a crop, and those of the picture that it shows by its own account."""
    picture = Image.fromarray(np.arange(scaled[0] * scaled[1], dtype=np.float32).reshape(scaled))
    top, left = (3, 17) if scaled[0] > 32 else (0, 0)
    view = CropParams(scaled, top, left, 32, flip, vertical, quarters)
    x, y = np.moveaxis(view.places(32), -1, 0)
    shown = np.asarray(view.mask(Image.new("L", (1, 1)))) != 255
    assert np.array_equal(shown, (x > 0) & (x < 1) & (y > 0) & (y < 1))
    rows, columns = (y[shown] * scaled[0]).astype(int), (x[shown] * scaled[1]).astype(int)
    assert np.array_equal(
        np.asarray(picture)[rows, columns], np.asarray(view.image(picture))[shown]
    )


@pytest.mark.parametrize("content", [None, b"", b"not votes", b"\x93NUMPY\x01\x00"])
def test_votes_that_cannot_be_read_are_named_with_the_way_out(stored, content):
    file = votes_file(stored[1], SAMPLE)
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    line = refusal(cut_votes, stored[1], SAMPLE, CropParams((60, 90), 0, 0, 32, False))
    assert line.startswith(f"{file}: holds no votes (")
    assert line.endswith("do the stage and later ones again with --from-stage 2")


def test_samples_have_votes_where_they_are_stored(splits, augment, tmp_path):
    for number, sample in enumerate(splits.val):  # maps of different sizes share batches
        maps = np.full((7, 2 + number, 3), number, np.float16)
        write_votes(votes_file(tmp_path, sample), maps)
    data = splits.val, splits.labeled, augment, RandomStreams(0, "6_retrain")
    samples, without = RetrainSamples(*data, votes=tmp_path), RetrainSamples(*data)
    keys = [SampleKey(2, index) for index in range(4)]
    batch, other = (default_collate([x[key] for key in keys]) for x in (samples, without))
    assert isinstance(batch.votes, CropVotes)
    assert batch.votes.log_ratio.shape == (4, 7, 13, 13)
    assert batch.votes.log_ratio[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert batch.votes.shown.shape == (4, 48, 48)
    assert other.votes == NoVotes()
    assert torch.equal(batch.image, other.image)
    assert torch.equal(batch.student_image, other.student_image)


def settings(words, name):
    """Settings of a run whose votes count, though nothing is fitted by so little training."""
    own = ["stages=[1,2,6]", "retrain.labels=average", "retrain.threshold=0.6", f"name={name}"]
    own += ["supervised.epochs=1", "checkpoint_every=1", "pseudo_label.neighbour_scales=[4.0]"]
    return read_config("demo.yaml", [*words, *own], "cisc_patch")


@pytest.fixture
def helpful(monkeypatch):
    """Let votes help, whatever images left out say."""
    monkeypatch.setattr(train, "draw_folds", lambda *_: [])


def parts_of(run):
    files = [*(run / "2_pseudo_label").rglob("*.npy"), *(run / "2_pseudo_label").rglob("*.png")]
    return {file.relative_to(run).as_posix(): file.read_bytes() for file in files}


@pytest.mark.exhaustive
def test_a_run_that_labels_anew_resumes_to_the_same_bits(
    demo_overrides, tmp_path, monkeypatch, helpful
):
    whole, cut = (settings(demo_overrides, name) for name in ("whole", "cut"))
    train.train(whole)
    run, again = tmp_path / "outdir" / "whole", tmp_path / "outdir" / "cut"
    images = len((Path(whole.dataset.root) / "unlabeled.txt").read_text().split())
    files = sorted((run / "2_pseudo_label" / "votes").rglob("*.npy"))
    assert len(files) == images
    assert all(np.load(file).dtype == np.float16 for file in files)
    kept = json.loads((run / "2_pseudo_label" / "stage.json").read_text())["files"]
    assert sum(name.startswith("votes/") for name in kept) == images

    calls, add = iter(range(1, 99)), train.Journal.add
    steps, done = iter(range(1, 99)), fitting.Progress.step_done

    def added(journal, *rest):
        if next(calls) == 2:  # the files of the second batch are there, its lines are not
            raise KeyboardInterrupt
        return add(journal, *rest)

    def stepped(progress):
        done(progress)
        if progress._stage.name == "6_retrain" and next(steps) == 3:
            raise KeyboardInterrupt

    for place, name, instead in (
        (train.Journal, "add", added),
        (fitting.Progress, "step_done", stepped),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, instead)
            with pytest.raises(KeyboardInterrupt):
                train.train(cut)
    train.train(cut)
    assert parts_of(again) == parts_of(run)
    networks = (load(x / "6_retrain" / "checkpoint.pth")["model"] for x in (run, again))
    assert same(*networks)

    (run / "2_pseudo_label" / "votes" / files[0].relative_to(files[0].parents[1])).unlink()
    assert "gone since 2_pseudo_label ended" in refusal(train.train, whole, from_stage=6)


@pytest.mark.slow
@pytest.mark.parametrize("change", ["retrain.labels=stored", "pseudo_label.neighbours=false"])
def test_nothing_is_stored_where_nothing_reads_it(demo_overrides, tmp_path, helpful, change):
    words = [*demo_overrides, "stages=[1,2,6]", "retrain.labels=average", "supervised.epochs=1"]
    words += ["retrain.epochs=1", "pseudo_label.neighbour_scales=[4.0]", "name=none", change]
    train.train(read_config("demo.yaml", words, "cisc_patch"))
    stage = tmp_path / "outdir" / "none" / "2_pseudo_label"
    assert (stage / "stage.json").is_file()
    assert not list(stage.rglob("*.npy"))
