"""The objectives of train.py, and one training step, on networks small enough to check."""

from functools import partial

import pytest
import torch
from torch import nn

from dataset.training import QueriedImage, QueriedPrototype, QueryPair, RetrainSample
from model.cisc import class_prototypes
from model.losses import cross_entropy, ohem_cross_entropy
from model.mixing import View, cut_mix, cut_out, paste_queried
from model.ops.layers import SegmentationNetwork
from train import (
    ClassThresholds,
    Rule,
    label_confidence,
    predicted_labels,
    retrain_objective,
    student_batch,
    supervised_objective,
    training_step,
    weight_by_anchors,
    weight_by_bank,
    weight_by_image,
    weight_one,
)
from utils import IGNORE
from utils.config.schema import OptimizerSection, RetrainSection
from utils.device import Device
from utils.optimization import Optimization

CPU, CLASSES = Device("cpu", "fp32"), 4
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)  # means of parts are far off


class Net(SegmentationNetwork):
    """Features are a convolution of the image, at its size; no batch norm, no dropout."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, CLASSES, 1)

    def extract(self, images):
        return self.backbone(images).relu()

    def classify(self, features):
        return self.head(features)


@pytest.fixture
def net():
    torch.manual_seed(1)
    return Net()


@pytest.fixture
def pair():
    torch.manual_seed(0)
    labels = torch.randint(0, CLASSES, (2, 4, 9, 9))
    labels[:, :2, :7] = IGNORE  # valid pixels and shared classes differ between parts
    images = torch.randn(2, 4, 3, 9, 9)
    shared_class = torch.tensor([IGNORE, 1, 0, 2])
    return QueryPair(images[0], labels[0], images[1], labels[1], shared_class)


@pytest.fixture
def samples(pair):
    queried = QueriedImage(
        pair.shared_class, torch.arange(4), pair.query_image.flip(0), pair.query_label.flip(0)
    )
    strong = (pair.image + 0.1).unsqueeze(1)
    return RetrainSample(
        pair.image, pair.label, strong, pair.query_image, pair.query_label, queried
    )


def prepared(samples, weight=None, **settings):
    """Views, unmixed unless the settings say so, with weights that differ from pixel to pixel."""
    weight = samples.image.mean(dim=1).sigmoid() if weight is None else weight
    rule = Rule(lambda *_: weight, passes=0, confident=False)
    section = RetrainSection(**{"mix": "none", **settings})
    thresholds = ClassThresholds(CLASSES, section)
    return student_batch(samples, None, None, rule, thresholds, section)


def retrained(net, samples, weight=None, **settings):
    batch = prepared(samples, weight, **settings)
    dropout = settings.get("feature_dropout", 0.0)
    return retrain_objective(net, batch, batch, cross_entropy, dropout)


def test_supervised_objective_adds_its_terms(net, pair):
    objective = partial(supervised_objective, labeled_loss=cross_entropy)
    plain = objective(net, pair, pair, consistency=0.0)
    both = cross_entropy(net(pair.image).logits, pair.label)
    both = both + cross_entropy(net(pair.query_image).logits, pair.query_label)
    close(plain.total, both)
    assert plain.terms.keys() == {"ce"}
    consistent = objective(net, pair, pair, consistency=2.0)
    close(consistent.total, plain.total + 2 * consistent.terms["consistency"])


def test_retrain_objective_adds_both_kinds_of_images_with_weight_one(net, samples):
    ones = weight_one(None, samples, None)
    loss = retrained(net, samples, ones)
    unlabeled = cross_entropy(net(samples.student_image[:, 0]).logits, samples.pseudo_label)
    labeled = cross_entropy(net(samples.labeled_image).logits, samples.labeled_label)
    close(loss.total, unlabeled + labeled)
    assert loss.terms["weight"] == 1.0
    assert loss.terms["queried"] == 0.75
    more = retrained(net, samples, ones, learn_queried=True)
    queried = cross_entropy(net(samples.queried.image).logits, samples.queried.label)
    close(more.total, loss.total + queried)


def test_views_are_averaged_and_count_as_much_as_the_perturbed_one(net, samples):
    torch.manual_seed(0)
    two = samples._replace(student_image=torch.randn(4, 2, 3, 9, 9))
    first, second = (
        retrained(net, samples._replace(student_image=two.student_image[:, [view]]))
        for view in (0, 1)
    )
    both = retrained(net, two)
    close(both.terms["unlabeled"], (first.terms["unlabeled"] + second.terms["unlabeled"]) / 2)
    dropped = retrained(net, two, feature_dropout=1e-12)  # nothing is dropped
    weak = retrained(net, samples._replace(student_image=samples.image.unsqueeze(1)))
    expected = (both.terms["unlabeled"] + weak.terms["unlabeled"]) / 2
    close(dropped.terms["unlabeled"], expected)


def test_pixels_that_mixing_ignores_do_not_count_in_the_mean(net, samples):
    torch.manual_seed(0)
    ones = weight_one(None, samples, None)
    view = prepared(samples, ones, mix="cutout")
    assert (view.view_label == IGNORE).sum() > (samples.pseudo_label == IGNORE).sum()
    torch.manual_seed(0)
    loss = retrained(net, samples, ones, mix="cutout")
    close(
        loss.terms["unlabeled"],
        cross_entropy(net(view.view_image[:, 0]).logits, view.view_label[:, 0]),
    )
    assert loss.terms["weight"] == 1.0


def test_classes_of_low_confidence_have_lower_thresholds():
    settings = RetrainSection(threshold=0.8, threshold_by_class=True, average_decay=0.5)
    thresholds = ClassThresholds(3, settings)
    label = torch.tensor([[[0, 0, 1, IGNORE]]])
    confidence = torch.tensor([[[0.9, 0.7, 0.5, 0.1]]])
    kept = thresholds(confidence, label)
    # Running means: (1 + 0.8) / 2, (1 + 0.5) / 2, and 1 for the class that is not there.
    torch.testing.assert_close(thresholds.mean, torch.tensor([0.9, 0.75, 1.0]))
    # 0.8, 0.8 and 0.8 * 0.75 / 0.9; the class that was never seen does not count as the highest.
    assert kept[0, 0, :3].tolist() == [True, False, False]
    again = thresholds(torch.full((1, 1, 4), 0.73), label)[0, 0]  # means 0.815 and 0.74
    assert again[:3].tolist() == [False, False, True]  # limits 0.8 and 0.8 * 0.74 / 0.815
    assert ClassThresholds(3, RetrainSection(threshold=0.6))(confidence, label).sum() == 2


def test_stored_prototypes_weigh_as_the_queried_images_do(net, samples):
    queried, features = samples.queried, net.extract(samples.image)
    bank, _ = class_prototypes(net.extract(queried.image), queried.label, CLASSES)
    banked = samples._replace(queried=QueriedPrototype(queried.shared_class, torch.arange(4)))
    by_image = weight_by_image(features, samples, None, teacher=net)
    by_bank = weight_by_bank(features, banked, None, bank)
    torch.testing.assert_close(by_bank, by_image)
    assert (by_bank[0] == 1).all()  # shares no class
    assert by_bank[1].min() < 0.9


def test_anchors_weigh_by_similarity_and_confidence(net, samples):
    features = net.extract(samples.image)
    prototypes, _ = class_prototypes(features, samples.pseudo_label, CLASSES)
    anchors = prototypes.mean(dim=0)
    confidence = label_confidence(net, features, samples.pseudo_label)
    plain = weight_by_anchors(features, samples, confidence, anchors, confident=False)
    times = weight_by_anchors(features, samples, confidence, anchors, confident=True)
    valid = samples.pseudo_label != IGNORE
    torch.testing.assert_close(times[valid], (plain * confidence)[valid])
    row, column = 8, 3  # features have the size of the image: a cosine by hand
    label = samples.pseudo_label[0, row, column]
    expected = torch.cosine_similarity(features[0, :, row, column], anchors[label], dim=0)
    assert plain[0, row, column].item() == pytest.approx(expected.item(), abs=1e-6)


def test_confidence_is_the_probability_of_the_label(net, samples):
    probability = net(samples.image).logits.softmax(dim=1)
    confidence = label_confidence(net, net.extract(samples.image), samples.pseudo_label)
    label = samples.pseudo_label[3, 8, 8]
    assert confidence[3, 8, 8] == probability[3, label, 8, 8]
    assert (confidence[samples.pseudo_label == IGNORE] == 0).all()
    predicted, most = predicted_labels(net, samples)
    padding = samples.pseudo_label == IGNORE
    assert (predicted.pseudo_label[padding] == IGNORE).all()
    assert torch.equal(predicted.pseudo_label[~padding], probability.argmax(dim=1)[~padding])
    assert (most >= confidence).all()


@pytest.fixture
def coded():
    """Views whose image, label and weight tell the image that they are of: 0 to 3."""
    torch.manual_seed(0)
    number = torch.arange(4.0)[:, None, None].expand(4, 9, 9)
    return View(number.unsqueeze(1).expand(4, 3, 9, 9), number.long(), number / 4)


def test_mixed_pixels_keep_image_label_and_weight_together(coded):
    mixed = cut_mix(coded, None)
    assert torch.equal(mixed.image[:, 0], mixed.label.float())
    assert torch.equal(mixed.image[:, 0], mixed.weight * 4)
    pasted = mixed.label != coded.label
    assert 0 < pasted.sum() < pasted.numel()
    assert torch.equal(mixed.label[pasted], coded.label.roll(-1, 0)[pasted])


def test_boxes_are_blank_or_of_the_queried_image(coded):
    blank = cut_out(coded, None)
    boxes = blank.label == IGNORE
    assert 0 < boxes.sum() < boxes.numel()
    assert (blank.image[:, 0][boxes] == 0).all()
    assert (blank.weight[boxes] == 0).all()
    queried = View(coded.image + 7, coded.label + 7, torch.ones_like(coded.weight))
    pasted = paste_queried(coded, queried)
    boxes = pasted.label >= 7
    assert 0 < boxes.sum() < boxes.numel()
    assert torch.equal(pasted.image[:, 0], pasted.label.float())
    assert (pasted.weight[boxes] == 1).all()
    assert torch.equal(pasted.weight[~boxes], coded.weight[~boxes])


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", ["pairs", "samples"])
def test_parts_of_a_batch_give_the_update_of_the_batch(pair, samples, kind, count):
    def updated(count):
        torch.manual_seed(1)
        net = Net()
        optimization = Optimization(net, OptimizerSection(lr=0.1), 9, CPU.scaler())
        supervised = partial(supervised_objective, labeled_loss=cross_entropy, consistency=0.7)
        student = partial(retrain_objective, labeled_loss=cross_entropy)
        mixed = partial(prepared, mix="unlabeled")  # as one batch, whatever the parts
        objective, batch, prepare = (
            (supervised, pair, None) if kind == "pairs" else (student, samples, mixed)
        )
        for step in range(3):
            terms, spoilt = training_step(
                net, objective, optimization, CPU, batch, step, count, prepare
            )
            assert spoilt is None
        return dict(net.state_dict()), terms

    close(updated(count), updated(1))


def test_a_step_that_is_not_finite_updates_nothing(net, pair):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    optimization = Optimization(net, OptimizerSection(), 9, CPU.scaler())
    objective = partial(supervised_objective, labeled_loss=cross_entropy, consistency=1.0)
    pair = pair._replace(image=pair.image * torch.nan)
    _, spoilt = training_step(net, objective, optimization, CPU, pair, 0)
    assert spoilt != spoilt
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_part_keeps_its_share_of_the_hardest_pixels():
    torch.manual_seed(0)
    logits, label = torch.randn(4, CLASSES, 5, 5), torch.randint(0, CLASSES, (4, 5, 5))
    hard = partial(ohem_cross_entropy, threshold=1e-9, min_kept=20)
    pixels = torch.tensor(100)
    parts = [hard(*part, pixels) for part in zip(logits.chunk(2), label.chunk(2), strict=True)]
    losses = torch.nn.functional.cross_entropy(logits, label, reduction="none").chunk(2)
    hardest = [loss.flatten().topk(10).values.mean() for loss in losses]
    torch.testing.assert_close(sum(parts), sum(hardest) / 2)
