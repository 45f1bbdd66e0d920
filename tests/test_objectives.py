import pytest
import torch
from torch import nn

from dataset.training import QueriedImage, QueriedPrototype, QueryPair, RetrainSample
from model import SegmentationOutput
from model.cisc import class_prototypes
from model.losses import cross_entropy
from model.objectives import retrain_loss, supervised_loss, weight_by_bank, weight_by_image


class Pointwise(nn.Module):
    """Features and logits are a 1 x 1 convolution of the image, at its size."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))

    def extract(self, images):
        return torch.einsum("dc,bchw->bdhw", self.weight, images).abs()

    def forward(self, images):
        features = self.extract(images)
        return SegmentationOutput(features, features)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Pointwise()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    images = torch.randn(4, 2, 3, 9, 9, dtype=torch.float64)
    labels = torch.randint(0, 4, (3, 2, 9, 9))
    labels[:, :, 0] = 255
    queried = QueriedImage(torch.tensor([2, 255]), images[3], labels[2])
    return RetrainSample(images[0], labels[0], images[1], images[2], labels[1], queried)


def test_a_bank_of_the_queried_images_weighs_as_they_do(net, batch):
    labeled, label = batch.queried.image, batch.queried.label
    bank, _ = class_prototypes(net.extract(labeled), label, 4)
    banked = batch._replace(
        queried=QueriedPrototype(batch.queried.shared_class, torch.tensor([0, 1]))
    )
    by_image, by_bank = weight_by_image(net, batch), weight_by_bank(net, bank, banked)
    torch.testing.assert_close(by_bank, by_image)
    assert (by_bank[1] == 1).all()  # shares no class
    assert by_bank[0].min() < 0.9


def test_retrain_loss_adds_both_kinds_of_images_with_weight_one(net, batch):
    shown = retrain_loss(net, None, cross_entropy, batch).shown
    total = retrain_loss(net, None, cross_entropy, batch).total
    unlabeled = cross_entropy(net(batch.student_image).logits, batch.pseudo_label)
    labeled = cross_entropy(net(batch.labeled_image).logits, batch.labeled_label)
    torch.testing.assert_close(total, unlabeled + labeled, check_dtype=False)
    assert shown["weight"] == 1.0
    assert shown["queried"] == 0.5


def test_retrain_loss_sends_no_gradient_to_the_teacher(net, batch):
    teacher = Pointwise()
    guide = lambda samples: weight_by_image(teacher, samples)  # noqa: E731
    retrain_loss(net, guide, cross_entropy, batch).total.backward()
    assert teacher.weight.grad is None
    assert net.weight.grad.abs().max() > 0


def test_without_consistency_stage_1_is_cross_entropy_of_both_images(net, batch):
    pair = QueryPair(
        batch.image, batch.pseudo_label, batch.labeled_image, batch.labeled_label, torch.tensor([1])
    )
    plain = supervised_loss(net, cross_entropy, 0.0, pair)
    both = cross_entropy(net(pair.image).logits, pair.label)
    both = both + cross_entropy(net(pair.query_image).logits, pair.query_label)
    torch.testing.assert_close(plain.total, both)
    assert plain.shown.keys() == {"ce"}
    consistent = supervised_loss(net, cross_entropy, 2.0, pair)
    expected = plain.total + 2 * consistent.shown["consistency"]
    torch.testing.assert_close(consistent.total, expected, check_dtype=False)
