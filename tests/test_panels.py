"""What a run draws and keeps to be looked at: query panels, predictions of the validation list."""

import csv
import json
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refusal
from PIL import Image
from torch.utils.data import default_collate

from dataset.catalog import KINDS
from dataset.lists import read_truth
from dataset.loader import SampleKey
from dataset.reading import read_mask, to_label
from model import network_of
from model.cisc import panels as panels_module
from model.cisc.panels import Evidence, Panels, keep_votes
from model.cisc.students import Labeler, needs_teacher
from utils import IGNORE, IMAGENET
from utils.config.reading import read_config
from utils.config.schema import DatasetSection
from utils.device import Device
from utils.evaluation import ConfusionMatrix
from utils.panels import as_picture, overlay, panel
from utils.run.log import Log
from utils.run.stages import Stage

PALETTE, CLASSES = KINDS["demo"].palette(), KINDS["demo"].classes


@pytest.fixture
def spoilt(splits, tmp_path):
    """True masks of all but the last image of val, which differ from val's in the upper half."""
    truth = {}
    for sample in splits.val[:-1]:
        ids = np.asarray(read_mask(sample.mask)).copy()
        ids[:24] = np.where(ids[:24] == IGNORE, IGNORE, (ids[:24] + 1) % 7)
        file = tmp_path / f"{len(truth)}.png"
        Image.fromarray(ids).save(file)
        truth[sample.name] = sample._replace(mask=file)
    return truth


@pytest.fixture
def draw(demo_overrides, retrain, spoilt, tmp_path, monkeypatch):
    """Draw panels of val, whose true masks stand for pseudo labels, by a network of no training.

    Returns titles, rows and folder for settings, samples and folders of labeling stages.
    """

    def draw(words=(), samples=retrain, labeled_by=(), epoch=10):
        config, calls = read_config("demo.yaml", [*demo_overrides, *words]), []
        device = Device("cpu", "fp32")
        stage = Stage("4_retrain", tmp_path, config, device, Log(tmp_path), watch=None)
        torch.manual_seed(0)
        net = network_of(config.model, 7, pretrained=None)
        teacher = deepcopy(net).eval() if needs_teacher(config.retrain) else None

        def capture(titles, rows, *layout):
            calls.append((titles, rows))
            return panel(titles, rows, *layout)

        monkeypatch.setattr(panels_module, "panel", capture)
        labeler = Labeler(config.retrain, teacher)
        panels = Panels(stage, samples, samples.unlabeled, labeler, labeled_by, spoilt)
        torch.manual_seed(7)
        state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        panels.draw(net, epoch, 100)
        assert torch.equal(torch.get_rng_state(), state)  # training's numbers are not used
        assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
        (titles, rows), folder = calls[0], stage.folder / "panels"
        return SimpleNamespace(titles=titles, rows=rows, folder=folder, labeler=labeler)

    return draw


def test_panels_of_the_paper_show_the_partner_that_training_draws(draw, retrain):
    drawn = draw(["retrain.weight=cisc_map"], epoch=3)
    crop, partner = ["unlabeled crop", "pseudo label", "wrong in it (red)"], "labeled partner"
    maps = ["CISC map (white: 1)", "weight (white: 1)"]
    assert drawn.titles == [*crop, partner, *maps, "student, epoch 3"]
    assert len(drawn.rows) == 4
    for number, row in enumerate(drawn.rows):
        sample = retrain[SampleKey(2, number)]  # of the third epoch
        image, label, wrong, (partner, name), cisc, weight, _ = row
        assert np.array_equal(np.asarray(label), sample.pseudo_label.byte().numpy())
        assert np.array_equal(np.asarray(image), np.asarray(as_picture(sample.image, IMAGENET)))
        own = as_picture(sample.partner.image, IMAGENET)
        half = overlay(own, sample.partner.label.byte().numpy(), PALETTE)
        assert np.array_equal(np.asarray(partner), np.asarray(half))
        shared = int(sample.partner.shared_class)
        assert name == ("no shared class" if shared == IGNORE else CLASSES[shared])
        batch = default_collate([sample])
        expected = (drawn.labeler(batch)[1][0] * (sample.pseudo_label != IGNORE)).numpy()
        assert np.abs(np.asarray(weight)[..., 0] / 255 - expected).max() <= 0.5 / 255 + 1e-6
        expected = drawn.labeler.cisc_map(batch)[0].detach().numpy()
        assert np.abs(np.asarray(cisc)[..., 0] / 255 - expected).max() <= 0.5 / 255 + 1e-6
        assert (wrong[1] == "no true mask") == (number == 3)


def test_errors_of_an_aimed_crop_are_those_of_the_crop_that_training_sees(draw, retrain, spoilt):
    """Its class is drawn from the pseudo label; the true mask has others."""
    aimed = retrain.augment.model_copy(update={"aim": 1.0})
    samples = replace(retrain, querier=None, augment=aimed)
    for number, row in enumerate(draw(samples=samples, epoch=3).rows[:-1]):
        key, sample = SampleKey(2, number), samples.unlabeled[number]
        label = samples[key].pseudo_label.byte().numpy()
        assert np.array_equal(np.asarray(samples.view(key).mask(read_mask(sample.mask))), label)
        true = np.asarray(samples.view(key).mask(read_mask(spoilt[sample.name].mask)))
        counted = (true != IGNORE) & (label != IGNORE)
        assert row[2][1] == f"{(true != label)[counted].mean():.0%}"


def test_what_a_method_does_not_use_is_not_drawn(draw, retrain):
    plain = replace(retrain, querier=None)
    titles = draw(samples=plain).titles
    assert titles == ["unlabeled crop", "pseudo label", "wrong in it (red)", "student, epoch 10"]
    assert "weight (white: 1)" in draw(["retrain.threshold=0.2"], plain).titles


def test_panels_of_votes_show_who_voted_and_where_labels_are_wrong(draw, retrain, splits, tmp_path):
    first, second = tmp_path / "2_pseudo_label", tmp_path / "5_relabel"
    names = [sample.name for sample in splits.labeled]
    maps = np.full((48, 64), 3, np.uint8), np.full((48, 64), 5, np.uint8)
    for sample in splits.val:
        voters = [(names[1], 0.625), (names[0], 0.25)]
        keep_votes(first, sample, Evidence(*maps, voters), PALETTE)
    keep_votes(second, splits.val[1], Evidence(*maps[::-1], [(names[2], 1.0)]), PALETTE)
    drawn = draw(samples=replace(retrain, querier=None), labeled_by=[first, second])
    both, wrong = "both: pseudo label", "wrong in it (red)"
    voters = ["voter 1", "voter 2"]
    titles = ["unlabeled image", "teacher", "votes", both, wrong, *voters, "student, epoch 10"]
    assert drawn.titles == titles
    for number, (row, sample) in enumerate(zip(drawn.rows, splits.val, strict=True)):
        image, teacher, votes, label, (shown, share), (voter, told), _, _ = row
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(sample.image)))
        ids = np.asarray(read_mask(sample.mask))
        assert np.array_equal(np.asarray(label), ids)
        once_more = number == 1  # labeled again in stage 5
        assert {*np.unique(teacher)} == {5 if once_more else 3}
        assert {*np.unique(votes)} == {3 if once_more else 5}
        assert told == ("100% of the votes" if once_more else "62% of the votes")
        own = splits.labeled[2 if once_more else 1]
        half = overlay(Image.open(own.image), np.asarray(read_mask(own.mask)), PALETTE)
        assert np.array_equal(np.asarray(voter), np.asarray(half))
        if number < 3:
            valid = ids != IGNORE
            assert share == f"{valid[:24].sum() / valid.sum():.0%}"
            red = (np.asarray(shown) == (220, 30, 30)).all(axis=2)
            assert np.array_equal(red, valid & (np.arange(48)[:, None] < 24))


def test_pictures_are_named_by_their_epoch(draw):
    folder = draw().folder
    draw(epoch=20)
    assert sorted(file.name for file in folder.iterdir()) == ["epoch_010.png", "epoch_020.png"]
    with Image.open(folder / "epoch_010.png") as picture:
        assert picture.width < 1400


def test_a_list_of_true_masks_that_is_not_there_is_refused_at_once(demo_root):
    section = DatasetSection(kind="demo", root=str(demo_root))
    assert read_truth(section, None) == {}
    assert len(read_truth(section, "truth.txt")) == 10
    line = refusal(read_truth, section, "no.txt")
    assert line.startswith("panels.truth: no.txt is not in")
    assert read_truth(section, str(demo_root / "truth.txt")) == read_truth(section, "truth.txt")


@pytest.mark.slow
def test_a_run_draws_its_last_epochs_and_keeps_predictions(finished, demo_root):
    run, _ = finished
    for stage in ("4_retrain", "6_retrain"):
        assert [file.name for file in (run / stage / "panels").iterdir()] == ["epoch_002.png"]
    results = json.loads((run / "results.json").read_text())
    for stage in ("1_supervised", "6_retrain"):
        place = run / "val" / stage
        (_, *classes), *rows = csv.reader((place / "confusion.csv").read_text().splitlines())
        total = ConfusionMatrix(len(classes))
        total.counts = torch.tensor([[int(count) for count in row[1:]] for row in rows])
        assert total.report(classes)["per_class_iou"] == results["stages"][stage]["per_class_iou"]
        images = list(csv.DictReader((place / "images.csv").read_text().splitlines()))
        assert len(images) == 4
        counted = ConfusionMatrix(len(classes))
        for image in images:
            assert (demo_root / image["image"]).samefile(image["picture"])
            mask = to_label(read_mask(place / "masks" / image["image"].replace(".jpg", ".png")))
            label = to_label(read_mask(run / "val" / image["label"]))
            single = ConfusionMatrix(len(classes))
            single.update(mask, label)
            assert float(image["miou"]) == single.mean_iou()
            assert float(image["pixel_accuracy"]) == single.pixel_accuracy()
            counted.counts += single.counts
        assert torch.equal(counted.counts, total.counts)
