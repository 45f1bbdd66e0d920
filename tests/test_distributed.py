"""Several processes on this machine, over gloo, against one: what all else is made of."""

import os
import signal
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from dataset.training import QueriedImage, QueryPair, RetrainSample
from model import build_model
from model.losses import cross_entropy, ohem_cross_entropy
from model.objectives import retrain_loss, supervised_loss
from model.ops.dropout import seed_dropout
from utils.batch_norm import synchronised
from utils.config.schema import OptimizerSection
from utils.device import Device
from utils.distributed import (
    barrier,
    by_first,
    gathered,
    is_first,
    joined,
    largest,
    merged,
    mine,
    parallel,
    rank,
    shared,
    total,
    world,
)
from utils.errors import Stopped, UserError, exit_with_one_line
from utils.evaluation import ConfusionMatrix
from utils.optimization import Optimization
from utils.run.signals import stop_here, stopping_later


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_lose_and_double_nothing_and_come_back_in_order(together, count):
    def work():
        return [(mine(range(n)), gathered([i * i for i in mine(range(n))])) for n in range(8)]

    outcomes = together(count, work)
    for n in range(8):
        parts = [list(outcome[n][0]) for outcome in outcomes]
        assert sorted(i for part in parts for i in part) == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert all(outcome[n][1] == [i * i for i in range(n)] for outcome in outcomes)


def test_two_processes_decide_add_and_write_as_one(together, tmp_path):
    def work():
        weight = torch.tensor(float(rank() + 2), requires_grad=True)
        added = total(weight.square())
        added.backward(torch.tensor(rank() + 1.0))
        by_first((tmp_path / "who").write_text)(str(rank()))
        matrix = ConfusionMatrix(2)
        matrix.update(torch.tensor([rank()]), torch.tensor([1]))
        return {
            "total": added.item(),
            "gradient": weight.grad.item(),
            "largest": largest(7 * rank()),
            "shared": shared(os.getpid),
            "merged": merged([{number: rank()} for number in mine([10, 11, 12])]),
            "counts": matrix.reduce().counts.tolist(),
            "place": (rank(), world(), is_first()),
        }

    one, two = together(2, work)
    assert (tmp_path / "who").read_text() == "0"
    assert (one.pop("place"), two.pop("place")) == ((0, 2, True), (1, 2, False))
    assert (one.pop("gradient"), two.pop("gradient")) == (2 * 2 * 3, 2 * 3 * 3)
    assert one == two
    assert one["total"] == 2 * 2 + 3 * 3
    assert one["largest"] == 7
    assert list(one["merged"].items()) == [(10, 0), (11, 1), (12, 0)]
    assert one["counts"] == [[0, 0], [1, 1]]


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0, 1, 3], [2]]])
def test_batch_norm_of_parts_is_batch_norm_of_the_whole(together, parts):
    torch.manual_seed(0)
    maps = torch.randn(4, 3, 5, 4, dtype=torch.float64) * 3 + 100
    slopes = torch.randn_like(maps)

    def normalised(own):
        torch.manual_seed(1)
        norm = nn.BatchNorm2d(3, dtype=torch.float64)
        nn.init.normal_(norm.weight)
        norm = synchronised(norm)
        inputs = maps[own].requires_grad_()
        out = norm(inputs)
        (out * slopes[own]).sum().backward()
        gradients = [total(norm.weight.grad), total(norm.bias.grad)]
        evaluated = norm.eval()(maps[own])
        return out.detach(), inputs.grad, evaluated, gradients, norm.state_dict()

    outcomes = together(2, lambda: normalised(parts[rank()]))
    expected = normalised([0, 1, 2, 3])
    assert expected[4]["running_mean"].abs().min() > 1
    for own, outcome in zip(parts, outcomes, strict=True):
        for found, whole in zip(outcome[:3], expected[:3], strict=True):
            torch.testing.assert_close(found, whole[own])
        torch.testing.assert_close(outcome[3:], expected[3:])


def batch_of(parts):
    """Part of a batch of four samples; valid pixels are not spread evenly."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 4, 3, 17, 17, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (3, 4, 17, 17), generator=generator)
    labels[:, 0, :11] = 255
    labels[0, 2] = 255
    shared_class = torch.tensor([1, 255, 2, 3])
    return images[:, parts], labels[:, parts], shared_class[parts]


def supervised(net, parts):
    images, labels, shared_class = batch_of(parts)
    pair = QueryPair(images[0], labels[0], images[1], labels[1], shared_class)
    return supervised_loss(net, cross_entropy, 1.0, pair)


def retrained(net, parts, min_kept):
    images, labels, shared_class = batch_of(parts)
    queried = QueriedImage(shared_class, images[3], labels[2])
    batch = RetrainSample(images[0], labels[0], images[1], images[2], labels[1], queried)
    hard = partial(ohem_cross_entropy, threshold=0.3, min_kept=min_kept)
    weigh = lambda batch: batch.image.abs().mean(dim=1).clamp_max(1)  # noqa: E731
    return retrain_loss(net, weigh, hard, batch)


@pytest.mark.parametrize(
    ("objective", "count"),
    [
        (supervised, 2),
        (partial(retrained, min_kept=700), 3),
        (partial(retrained, min_kept=10**6), 2),
    ],
    ids=["pairs", "hard pixels, uneven parts", "all pixels"],
)
def test_losses_gradients_and_statistics_of_parts_add_up_to_the_wholes(together, objective, count):
    def step():
        torch.manual_seed(0)
        net = build_model("deeplabv3plus", "resnet18", 5, output_stride=16).double()
        net, parts = synchronised(net), mine([0, 1, 2, 3])
        seed_dropout(net, [100 + index for index in parts])
        student = parallel(net)  # gradients are averaged for as long as it lives
        loss = objective(student, parts)
        (loss.total * world()).backward()
        values = {name: total(value.detach()) for name, value in loss.shown.items()}
        gradients = {f"{name}'": weight.grad for name, weight in net.named_parameters()}
        return {**values, **gradients, **dict(net.named_buffers())}

    (expected,) = together(1, step)
    for found in together(count, step):
        # Cross entropy is in float32 whatever comes.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_finite_for_one_process_alone_changes_nothing(together):
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
        sgd.add(whole(torch.full((1, 1), torch.inf if is_first() else 1.0)))
        stepped, same = bool(sgd.step().finite), all(map(torch.equal, before, net.parameters()))
        sgd.add(whole(torch.ones(1, 1)))
        return stepped, same, bool(sgd.step().finite)

    assert together(2, work) == [(False, True, True)] * 2


@pytest.fixture
def ended(monkeypatch, capfd):
    """Run a program as torchrun would; return the processes' exit codes and what they said."""

    def process(number, program):
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}

        def main():
            with joined():
                program()

        exit_with_one_line(main)

    def run(count, program):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        environment = {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        environment |= {"MASTER_ADDR": store.host, "MASTER_PORT": str(store.port)}
        for name, value in {**environment, "WORLD_SIZE": str(count)}.items():
            monkeypatch.setenv(name, value)
        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=process, args=(n, program)) for n in range(count)]
        for one in processes:
            one.start()
        for one in processes:
            one.join(30)
        return [one.exitcode for one in processes], capfd.readouterr().err.splitlines()

    return run


def test_what_goes_well_ends_well(ended):
    assert ended(2, lambda: largest(rank())) == ([0, 0], [])


def test_a_mistake_of_all_is_told_once(ended):
    def program():
        raise UserError("demo.yaml: no such config")

    assert ended(3, program) == ([2, 2, 2], ["error: demo.yaml: no such config"])


def test_a_process_that_fails_ends_those_that_wait_for_it(ended):
    def program():
        if rank() == 1:
            raise UserError("x.png: is no picture")
        barrier()

    assert ended(3, program) == ([2, 2, 2], ["error: x.png: is no picture"])


def test_a_process_that_fails_ends_those_that_hang(ended):
    def program():
        if rank() == 1:
            raise UserError("x.png: is no picture")
        time.sleep(600)

    assert ended(2, program) == ([2, 2], ["error: x.png: is no picture"])


def test_a_process_that_is_killed_ends_the_others_with_a_word(ended):
    def program():
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        barrier()

    codes, (line,) = ended(2, program)
    assert codes == [2, -signal.SIGKILL]
    assert line.startswith("error: torchrun: another process of this run is gone without a word")


def test_a_state_that_cannot_be_saved_is_told_though_others_have_stopped(ended):
    def program():
        if is_first():
            time.sleep(1)
            raise UserError("resume.pth: cannot write this file")
        raise Stopped(signal.SIGTERM)

    codes, lines = ended(2, program)
    assert (codes, lines) == ([2, 143], ["error: resume.pth: cannot write this file"])


def test_a_signal_to_one_process_stops_all_at_the_same_place(ended):
    def program():
        with stopping_later():
            stop_here()
            if rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)  # torchrun hands on what it gets, too
            stop_here()

    codes, (line,) = ended(2, program)
    assert codes == [143, 143]
    assert line.startswith("stopped by SIGTERM, all that is done is saved")
