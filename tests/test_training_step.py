from functools import partial

import pytest
import torch
from torch import nn

from dataset.training import QueriedPrototype, QueryPair, RetrainSample
from model import SegmentationOutput
from model.losses import cross_entropy, ohem_cross_entropy
from model.objectives import retrain_loss, supervised_loss
from model.ops.dropout import Dropout2d
from model.training_step import training_step
from utils import IGNORE
from utils.config.schema import OptimizerSection
from utils.device import Device
from utils.optimization import Optimization

CPU, CLASSES = Device("cpu", "fp32"), 3


class Net(nn.Module):
    """No batch norm, which sees a part; dropout, whose noise is the sample's."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, CLASSES, 1)
        self.dropout = Dropout2d(0.5)

    def forward(self, images):
        features = self.dropout(self.backbone(images)).relu()
        return SegmentationOutput(self.head(features), features)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    labels = torch.randint(0, CLASSES, (2, 4, 9, 9))
    labels[:, :2, :7] = IGNORE  # the first part is mostly void, and shares its class once less
    shared = torch.tensor([IGNORE, 1, 0, 2])
    images = torch.randn(2, 4, 3, 9, 9)
    return QueryPair(images[0], labels[0], images[1], labels[1], shared)


def steps(loss, batch, count):
    """Weights after three steps, and what the last one shows."""
    torch.manual_seed(1)
    net = Net()
    optimization = Optimization(net, OptimizerSection(lr=0.1), 9, CPU.scaler())
    for step in range(3):
        seeds = torch.arange(4) + 10 * step
        shown, _ = training_step(net, partial(loss, net), optimization, CPU, batch, seeds, count)
    return dict(net.state_dict()), shown


close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)  # means of parts would be far off


@pytest.mark.parametrize("count", [2, 4])
def test_parts_of_a_batch_of_pairs_learn_what_the_batch_does(pair, count):
    def loss(net, part, batch):
        return supervised_loss(net, cross_entropy, 0.7, part, batch)

    close(steps(loss, pair, count), steps(loss, pair, 1))


@pytest.mark.parametrize("count", [2, 4])
def test_parts_of_a_batch_of_samples_learn_what_the_batch_does(pair, count):
    queried = QueriedPrototype(pair.shared_class, torch.arange(4))
    samples = RetrainSample(
        pair.image, pair.label, pair.image, pair.query_image, pair.query_label, queried
    )

    def weigh(part):
        return part.image.mean(dim=1).sigmoid()

    def loss(net, part, batch):
        return retrain_loss(net, weigh, cross_entropy, part, batch)

    close(steps(loss, samples, count), steps(loss, samples, 1))


def test_a_part_keeps_its_share_of_the_hardest_pixels():
    torch.manual_seed(0)
    logits, label = torch.randn(4, CLASSES, 5, 5), torch.randint(0, CLASSES, (4, 5, 5))
    hard = partial(ohem_cross_entropy, threshold=1e-9, min_kept=20)
    parts = [
        hard(*part, batch_label=label) for part in zip(logits.chunk(2), label.chunk(2), strict=True)
    ]
    losses = torch.nn.functional.cross_entropy(logits, label, reduction="none").chunk(2)
    hardest = [loss.flatten().topk(10).values.mean() for loss in losses]
    torch.testing.assert_close(sum(parts), sum(hardest) / 2)
