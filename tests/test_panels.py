"""What a run draws and keeps to be looked at: query panels, predictions of the validation list."""

import csv
import json
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refusal
from PIL import Image

import model.panels
from dataset.lists import read_truth
from dataset.reading import read_mask, to_label
from model import network_of
from model.panels import QueryPanels
from utils import IGNORE
from utils.config.reading import read_config
from utils.config.schema import DatasetSection
from utils.device import Device
from utils.evaluation import ConfusionMatrix
from utils.panels import panel
from utils.run.log import Log
from utils.run.stages import Stage


@pytest.fixture
def drawn(demo_overrides, demo_root, splits, querier, tmp_path, monkeypatch):
    """Draw panels of val, whose true masks stand for pseudo labels, by a network of no training.

    Returns titles, rows, the stage, and where the truth differs from the labels: the upper half.
    """
    config = read_config("demo.yaml", [*demo_overrides, "panels.images=3"])
    device, asked, calls = Device("cpu", "fp32"), [], []
    stage = Stage("4_retrain", tmp_path, config, device, Log(tmp_path), watch=None)
    truth = {}
    for sample in splits.val[:-1]:
        ids = np.asarray(read_mask(sample.mask)).copy()
        ids[:24] = np.where(ids[:24] == IGNORE, IGNORE, (ids[:24] + 1) % 7)
        file = tmp_path / f"{len(truth)}.png"
        Image.fromarray(ids).save(file)
        truth[sample.name] = sample._replace(mask=file)
    torch.manual_seed(0)
    net = network_of(config.model, 7, pretrained=None)

    def judge(sample):
        asked.append(sample)
        weight = torch.zeros_like(sample.image[:, 0])
        weight[:, :, :32] = 1.0  # of 64 columns
        return sample.pseudo_label, weight

    def capture(titles, rows, *layout):
        calls.append((titles, rows))
        return panel(titles, rows, *layout)

    monkeypatch.setattr(model.panels, "panel", capture)
    panels = QueryPanels(stage, splits.val, truth, querier, deepcopy(net).eval(), judge)
    torch.manual_seed(7)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    panels.draw(net, 10, 100)
    assert torch.equal(torch.get_rng_state(), state)  # training's numbers are not used
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    panels.draw(net, 20, 200)
    return SimpleNamespace(
        titles=calls[0][0], rows=calls[0][1], again=calls[1][1], asked=asked, stage=stage
    )


def test_panels_show_what_is_queried_and_where_labels_are_wrong(drawn, splits):
    assert drawn.titles[:3] == ["unlabeled image", "pseudo label", "wrong in it (red)"]
    assert drawn.titles[-1] == "student, epoch 10"
    assert len(drawn.rows) == 3
    names = splits.val[0], splits.val[1], splits.val[2]  # of 4, evenly spaced
    for sample, row in zip(names, drawn.rows, strict=True):
        image, label, (wrong, share), (_, shared), cisc, weight, _ = row
        ids = np.asarray(read_mask(sample.mask))
        assert np.array_equal(np.asarray(label), ids)
        valid = ids != IGNORE
        assert share == f"{valid[:24].sum() / valid.sum():.0%}"
        red = (np.asarray(wrong) == (220, 30, 30)).all(axis=2)
        assert np.array_equal(red, valid & (np.arange(48)[:, None] < 24))
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(sample.image)))
        grey = np.asarray(weight)[..., 0]
        assert np.array_equal(grey == 255, valid & (np.arange(64) < 32))
        assert set(np.unique(grey)) <= {0, 255}
        assert np.asarray(cisc).shape == (48, 64, 3)
        classes = ("background", "ball", "crate", "bricks", "leaf", "fish", "mug")
        assert shared == "no shared class" or classes.index(shared) in ids
    queried = [sample.queried for sample in drawn.asked]
    assert any((q.label == q.shared_class).any() for q in queried)


def test_the_same_images_and_partners_are_drawn_every_time(drawn):
    for row, again in zip(drawn.rows, drawn.again, strict=True):
        for one, other in zip(row[:6], again[:6], strict=True):
            pair = [each[0] if isinstance(each, tuple) else each for each in (one, other)]
            assert np.array_equal(*map(np.asarray, pair))
    pictures = sorted(file.name for file in (drawn.stage.folder / "panels").iterdir())
    assert pictures == ["epoch_010.png", "epoch_020.png"]
    with Image.open(drawn.stage.folder / "panels" / "epoch_010.png") as picture:
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
