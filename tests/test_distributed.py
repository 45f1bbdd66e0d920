"""Several processes on this machine, over gloo, against one."""

import os
import signal
from functools import partial

import pytest
import torch
from torch import nn

from dataset.training import QueryPair
from model import build_model
from model.losses import cross_entropy
from train import StudentBatch, retrain_objective, supervised_objective, training_step
from utils.config.schema import OptimizerSection
from utils.device import Device
from utils.distributed import (
    broadcast,
    by_first,
    gathered,
    is_first,
    largest,
    merged,
    mine,
    parallel,
    rank,
    reduced,
    world,
)
from utils.errors import Stopped
from utils.evaluation import ConfusionMatrix
from utils.optimization import Optimization
from utils.run.signals import stop_here, stopping_later


@pytest.mark.parametrize("count", [1, 3])
def test_parts_lose_and_double_nothing_and_come_back_in_order(together, count):
    def work():
        return [(mine(range(n)), gathered([i * i for i in mine(range(n))])) for n in range(8)]

    outcomes = together(count, work)
    for n in range(8):
        parts = [list(outcome[n][0]) for outcome in outcomes]
        assert sorted(i for part in parts for i in part) == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert all(outcome[n][1] == [i * i for i in range(n)] for outcome in outcomes)


def test_two_processes_decide_reduce_and_write_as_one(together, tmp_path):
    def work():
        by_first((tmp_path / "who").write_text)(str(rank()))
        matrix = ConfusionMatrix(2)
        matrix.update(torch.tensor([rank()]), torch.tensor([1]))
        return {
            "reduced": reduced(torch.tensor(float(rank() + 2))).item(),
            "largest": largest(7 * rank()),
            "broadcast": broadcast(os.getpid),
            "merged": merged([{number: rank()} for number in mine([10, 11, 12])]),
            "counts": matrix.reduce().counts.tolist(),
            "place": (rank(), world(), is_first()),
        }

    one, two = together(2, work)
    assert (tmp_path / "who").read_text() == "0"
    assert (one.pop("place"), two.pop("place")) == ((0, 2, True), (1, 2, False))
    assert one == two
    assert one["reduced"] == 2 + 3
    assert one["largest"] == 7
    assert list(one["merged"].items()) == [(10, 0), (11, 1), (12, 0)]
    assert one["counts"] == [[0, 0], [1, 1]]


def batch_of(chosen):
    """Part of a batch of four samples; valid pixels are not spread evenly."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 4, 3, 17, 17, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (3, 4, 17, 17), generator=generator)
    labels[:, 0, :11] = 255
    labels[0, 2] = 255
    shared_class = torch.tensor([1, 255, 2, 3])
    return images[:, chosen], labels[:, chosen], shared_class[chosen]


def pairs(chosen):
    images, labels, shared_class = batch_of(chosen)
    batch = QueryPair(images[0], labels[0], images[1], labels[1], shared_class)
    return partial(supervised_objective, labeled_loss=cross_entropy, consistency=1.0), batch


def samples(chosen):
    images, labels, shared_class = batch_of(chosen)
    weight = images[0].abs().mean(dim=1).clamp_max(1)
    known = images[[2, 3]].transpose(0, 1), labels[[1, 2]].transpose(0, 1)
    unknown = images[[1, 0]].transpose(0, 1), labels[[0, 0]].transpose(0, 1)
    batch = StudentBatch(*known, *unknown, weight.unsqueeze(1).expand(-1, 2, -1, -1), shared_class)
    return partial(retrain_objective, labeled_loss=cross_entropy), batch


@pytest.mark.parametrize(("kind", "count", "accumulate"), [(samples, 3, 1), (pairs, 2, 2)])
def test_a_step_of_several_processes_is_that_of_one(together, kind, count, accumulate):
    def step():
        torch.manual_seed(0)
        net = build_model("deeplabv3plus", "resnet18", 5, output_stride=16).double()
        net.train()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d | nn.Dropout | nn.Dropout2d):
                module.eval()  # parts of a batch have statistics and noise of their own
        objective, batch = kind(mine([0, 1, 2, 3]))
        student = parallel(net)  # gradients are averaged for as long as it lives
        device = Device("cpu", "fp32")
        optimization = Optimization(net, OptimizerSection(lr=0.01), 9, device.scaler())
        terms, spoilt = training_step(
            student, objective, optimization, device, batch, 0, accumulate if world() > 1 else 1
        )
        assert spoilt is None
        values = {name: reduced(value) for name, value in terms.items()}
        return {**values, **{name: weight.detach() for name, weight in net.named_parameters()}}

    (expected,) = together(1, step)
    for found in together(count, step):
        # Cross entropy is in float32 in every precision.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_finite_for_one_process_alone_stops_all(together):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Linear(1, 1), nn.Linear(1, 1)

        def forward(self, values):
            return self.head(self.backbone(values)).sum()

    def work():
        torch.manual_seed(0)
        net = Net()
        before = [weight.clone() for weight in net.parameters()]
        whole = parallel(net)
        sgd = Optimization(net, OptimizerSection(), 9, Device("cpu", "fp32").scaler())
        sgd.backward(whole(torch.full((1, 1), torch.inf if is_first() else 1.0)))
        return sgd.step() is None, all(map(torch.equal, before, net.parameters()))

    assert together(2, work) == [(False, True)] * 2


def test_a_signal_to_one_process_stops_all_at_the_same_place(together):
    def work():
        with stopping_later():
            stop_here()
            if rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            try:
                stop_here()
            except Stopped as stopped:
                return stopped.number
        return None

    assert together(2, work) == [signal.SIGTERM] * 2
