import pytest
import torch
from torch import nn

from utils.config.schema import OptimizerSection
from utils.device import Device
from utils.optimization import Optimization


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.backbone.weight)
        nn.init.ones_(self.head.weight)

    def loss(self):
        return self.backbone.weight.sum() + self.head.weight.sum()


@pytest.fixture(params=["fp32", "fp16"])
def scaler(request):
    """The gradients' scaler of a precision: fp16 has one that does something."""
    return torch.amp.GradScaler("cpu", enabled=request.param == "fp16")


def optimization(net, steps=4, scaler=None, **settings):
    plain = {"lr": 0.1, "head_multiple": 2, "momentum": 0, "weight_decay": 0, "power": 1}
    section = OptimizerSection(**{**plain, **settings})
    return Optimization(net, section, steps, scaler or Device("cpu", "fp32").scaler(), undo=True)


def test_steps_match_hand_count(scaler):
    net = Net()
    sgd = optimization(net, scaler=scaler)  # rates 0.1, 0.075, 0.05, 0.025
    for _ in range(4):
        down(sgd, net.loss())
    assert net.backbone.weight.item() == pytest.approx(1 - 0.25)
    assert net.head.weight.item() == pytest.approx(1 - 0.5)
    assert sgd.lr == 0


def down(sgd, *losses):
    for loss in losses:
        sgd.add(loss)
    return bool(sgd.step().finite)


def test_gradients_of_several_losses_add_up_to_one_step():
    one, parts = Net(), Net()
    down(optimization(one), one.loss())
    sgd = optimization(parts)
    down(sgd, parts.loss() / 4, parts.loss() * 0.75)
    assert parts.head.weight.item() == pytest.approx(one.head.weight.item())
    assert sgd.lr == pytest.approx(0.075)


def test_one_loss_that_is_not_finite_spoils_no_later_step(scaler):
    net = Net()
    sgd = optimization(net, scaler=scaler)
    assert not down(sgd, net.loss(), net.loss() * torch.nan, net.loss())
    assert net.head.weight.item() == 1.0
    assert down(sgd, net.loss())


def test_polynomial_decay():
    net = Net()
    sgd = optimization(net, steps=10, power=0.9)
    for _ in range(5):
        down(sgd, net.loss())
    assert sgd.lr == pytest.approx(0.1 * 0.5**0.9)


def test_going_on_from_a_saved_state_is_exact():
    whole, first, second = Net(), Net(), Net()
    settings = {"momentum": 0.9, "weight_decay": 0.01, "power": 0.9}
    reference = optimization(whole, **settings)
    for _ in range(4):
        down(reference, whole.loss().square())
    before = optimization(first, **settings)
    for _ in range(2):
        down(before, first.loss().square())
    after = optimization(second, **settings)
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    for _ in range(2):
        down(after, second.loss().square())
    assert torch.equal(second.head.weight, whole.head.weight)


@pytest.mark.parametrize("first", [True, False])
def test_a_loss_that_is_not_finite_changes_the_rate_alone(first, scaler):
    """The forward pass has spoilt the running mean: it is put right again."""
    net = Net()
    net.norm = nn.BatchNorm1d(1)
    sgd = optimization(net, momentum=0.9, scaler=scaler)
    if not first:
        net.norm(torch.ones(2, 1))
        assert down(sgd, net.loss())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    rate = sgd.lr
    net.norm(torch.full((2, 1), torch.inf))
    assert not down(sgd, net.loss() * torch.nan)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert sgd.lr == pytest.approx(rate - 0.025)
    assert down(sgd, net.loss())
    assert net.head.weight.isfinite()


def test_a_gradient_that_is_not_finite_changes_no_weight():
    net = Net()
    sgd = optimization(net, momentum=0.9)
    infinite_slope = (net.head.weight.sum() - 1).sqrt()
    sgd.add(net.loss() + infinite_slope)  # the loss itself is finite: 2
    outcome = sgd.step()
    assert outcome.loss == 2
    assert not outcome.finite
    assert [weight.item() for weight in net.parameters()] == [1, 1]
    assert down(sgd, net.loss())
    assert net.head.weight.item() == pytest.approx(1 - 0.15)  # no momentum was kept


def test_fp16_leaves_out_what_overflows_and_tells_when_all_does():
    net = Net()
    sgd = optimization(net, steps=99, scaler=torch.amp.GradScaler("cpu"))
    assert down(sgd, net.loss() * 1e36)  # scaled by 2 ** 16 it overflows
    assert net.head.weight.item() == 1.0
    assert not sgd.overflows
    assert down(sgd, net.loss())
    assert net.head.weight.item() < 1.0
    for _ in range(20):
        down(sgd, net.loss() + (net.head.weight - net.head.weight.detach()).sqrt().sum())
    assert sgd.overflows
