"""The objectives of train.py, and one training step, on networks small enough to check."""

from functools import partial

import pytest
import torch
from torch import nn

from dataset.training import QueriedImage, QueriedPrototype, QueryPair, RetrainSample
from model import SegmentationOutput
from model.cisc import class_prototypes
from model.losses import cross_entropy, ohem_cross_entropy
from train import (
    Loss,
    cut_mix,
    label_confidence,
    predicted_labels,
    retrain_objective,
    supervised_objective,
    training_step,
    weight_by_anchors,
    weight_by_bank,
    weight_by_image,
    weight_one,
)
from utils import IGNORE
from utils.config.schema import OptimizerSection
from utils.device import Device
from utils.optimization import Optimization

CPU, CLASSES = Device("cpu", "fp32"), 4
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)  # means of parts are far off


class Net(nn.Module):
    """Features are a convolution of the image, at its size; no batch norm, no dropout."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, CLASSES, 1)

    def extract(self, images):
        return self.backbone(images).relu()

    def forward(self, images):
        features = self.extract(images)
        return SegmentationOutput(self.head(features), features)


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
    queried = QueriedImage(pair.shared_class, pair.query_image.flip(0), pair.query_label.flip(0))
    strong = pair.image + 0.1
    return RetrainSample(
        pair.image, pair.label, strong, pair.query_image, pair.query_label, queried
    )


def retrained(student, samples, batch):
    weight = samples.image.mean(dim=1).sigmoid()
    return retrain_objective(student, samples, batch, weight, cross_entropy)


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
    weight = weight_one(net, samples, None)
    loss = retrain_objective(net, samples, samples, weight, cross_entropy)
    unlabeled = cross_entropy(net(samples.student_image).logits, samples.pseudo_label)
    labeled = cross_entropy(net(samples.labeled_image).logits, samples.labeled_label)
    close(loss.total, unlabeled + labeled)
    assert loss.terms["weight"] == 1.0
    assert loss.terms["queried"] == 0.75


def test_stored_prototypes_weigh_as_the_queried_images_do(net, samples):
    queried = samples.queried
    bank, _ = class_prototypes(net.extract(queried.image), queried.label, CLASSES)
    banked = samples._replace(queried=QueriedPrototype(queried.shared_class, torch.arange(4)))
    by_image = weight_by_image(net, samples, None)
    by_bank = weight_by_bank(net, banked, None, bank)
    torch.testing.assert_close(by_bank, by_image)
    assert (by_bank[0] == 1).all()  # shares no class
    assert by_bank[1].min() < 0.9


def test_anchors_weigh_by_similarity_and_confidence(net, samples):
    features = net.extract(samples.image)
    prototypes, _ = class_prototypes(features, samples.pseudo_label, CLASSES)
    anchors = prototypes.mean(dim=0)
    confidence = label_confidence(net, samples)
    plain = weight_by_anchors(net, samples, confidence, anchors)
    times = weight_by_anchors(net, samples, confidence, anchors, confident=True)
    valid = samples.pseudo_label != IGNORE
    torch.testing.assert_close(times[valid], (plain * confidence)[valid])
    row, column = 8, 3  # features have the size of the image: a cosine by hand
    label = samples.pseudo_label[0, row, column]
    expected = torch.cosine_similarity(features[0, :, row, column], anchors[label], dim=0)
    assert plain[0, row, column].item() == pytest.approx(expected.item(), abs=1e-6)


def test_confidence_is_the_probability_of_the_label(net, samples):
    probability = net(samples.image).logits.softmax(dim=1)
    confidence = label_confidence(net, samples)
    label = samples.pseudo_label[3, 8, 8]
    assert confidence[3, 8, 8] == probability[3, label, 8, 8]
    assert (confidence[samples.pseudo_label == IGNORE] == 0).all()
    predicted, most = predicted_labels(net, samples)
    padding = samples.pseudo_label == IGNORE
    assert (predicted.pseudo_label[padding] == IGNORE).all()
    assert torch.equal(predicted.pseudo_label[~padding], probability.argmax(dim=1)[~padding])
    assert (most >= confidence).all()


def test_mixed_pixels_keep_image_label_and_weight_together(samples):
    torch.manual_seed(0)
    coded = torch.arange(4.0)[:, None, None].expand(4, 9, 9)
    samples = samples._replace(
        student_image=coded.unsqueeze(1).expand(4, 3, 9, 9), pseudo_label=coded.long()
    )
    mixed, weight = cut_mix(samples, coded / 4)
    assert torch.equal(mixed.student_image[:, 0], mixed.pseudo_label.float())
    assert torch.equal(mixed.student_image[:, 0], weight * 4)
    pasted = mixed.pseudo_label != samples.pseudo_label
    assert 0 < pasted.sum() < pasted.numel()
    assert torch.equal(mixed.pseudo_label[pasted], samples.pseudo_label.roll(-1, 0)[pasted])
    assert torch.equal(mixed.image, samples.image)  # the teacher's view is not mixed


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", ["pairs", "samples"])
def test_parts_of_a_batch_give_the_update_of_the_batch(pair, samples, kind, count):
    def updated(count):
        torch.manual_seed(1)
        net = Net()
        optimization = Optimization(net, OptimizerSection(lr=0.1), 9, CPU.scaler())
        supervised = partial(supervised_objective, labeled_loss=cross_entropy, consistency=0.7)
        objective, batch = (supervised, pair) if kind == "pairs" else (retrained, samples)
        for step in range(3):
            terms, spoilt = training_step(net, objective, optimization, CPU, batch, step, count)
            assert spoilt is None
        return dict(net.state_dict()), terms

    close(updated(count), updated(1))


def test_a_step_that_is_not_finite_updates_nothing(net, pair):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    optimization = Optimization(net, OptimizerSection(), 9, CPU.scaler())

    def objective(student, part, _):
        total = student(part.image).logits.mean() * torch.nan
        return Loss(total, {"ce": total})

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
