import pytest
import torch
from torch import nn

from utils.config import OptimizerSection
from utils.optimization import Optimization
from utils.precision import Device


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.backbone.weight)
        nn.init.ones_(self.head.weight)

    def loss(self):
        return self.backbone.weight.sum() + self.head.weight.sum()


def optimization(net, steps=4, **settings):
    plain = {"lr": 0.1, "head_multiple": 2, "momentum": 0, "weight_decay": 0, "power": 1}
    section = OptimizerSection(**{**plain, **settings})
    return Optimization(net, section, steps, Device("cpu", "fp32").scaler(), undo=True)


def test_steps_match_hand_count():
    net = Net()
    sgd = optimization(net)  # rates 0.1, 0.075, 0.05, 0.025: a quarter of 0.1 less every step
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


def test_one_loss_that_is_not_finite_spoils_no_later_step():
    net = Net()
    sgd = optimization(net)
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
def test_a_loss_that_is_not_finite_changes_the_rate_alone(first):
    """The forward pass has spoilt the running mean: it is put right again."""
    net = Net()
    net.norm = nn.BatchNorm1d(1)
    sgd = optimization(net, momentum=0.9)
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
    assert sgd.add(net.loss() + infinite_slope)  # the loss itself is finite: 2
    outcome = sgd.step()
    assert outcome.loss == 2
    assert not outcome.finite
    assert [weight.item() for weight in net.parameters()] == [1, 1]
    assert down(sgd, net.loss())
    assert net.head.weight.item() == pytest.approx(1 - 0.15)  # no momentum was kept
