import pytest
import torch
from conftest import same
from networks import FAMILIES, family
from torch import nn

from utils import checkpoint
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


def optimization(net, iterations=4, scaler=None, average=None, **settings):
    plain = {"lr": 0.1, "head_multiple": 2, "momentum": 0, "weight_decay": 0, "power": 1}
    section = OptimizerSection(**{**plain, **settings})
    scaler = scaler or Device("cpu", "fp32").scaler()
    return Optimization(net, section, iterations, scaler, average, decay=0.6)


def update(optimized, *losses):
    for loss in losses:
        optimized.backward(loss)
    return optimized.step()


@pytest.mark.parametrize("fp16", [False, True])
def test_steps_match_hand_count(fp16):
    net = Net()
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    sgd = optimization(net, scaler=scaler)  # rates 0.1, 0.075, 0.05, 0.025
    for _ in range(4):
        assert update(sgd, net.loss() / 4, net.loss() * 0.75) is None  # parts of a batch add up
    assert net.backbone.weight.item() == pytest.approx(1 - 0.25)
    assert net.head.weight.item() == pytest.approx(1 - 0.5)
    assert sgd.lr == 0


def test_polynomial_decay_after_a_linear_warm_up():
    net = Net()
    sgd = optimization(net, iterations=10, power=0.9, warmup=3)
    rates = []
    for _ in range(6):
        rates.append(sgd.lr)
        update(sgd, net.loss())
    rising = [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]
    assert rates == pytest.approx(
        [0.1 * (1 - i / 10) ** 0.9 * factor for i, factor in enumerate(rising)]
    )


def test_adamw_moves_by_its_rate_and_decays_apart_from_the_gradient():
    net = Net()
    adam = optimization(net, name="adamw", weight_decay=0.5)
    update(adam, net.loss())
    # The first step of Adam is the rate times the gradient's sign; decay is rate * 0.5 * weight.
    assert net.backbone.weight.item() == pytest.approx(1 - 0.1 * 0.5 - 0.1, abs=1e-6)
    assert net.head.weight.item() == pytest.approx(1 - 0.2 * 0.5 - 0.2, abs=1e-6)


def test_layer_decay_lowers_the_rate_towards_the_input():
    net = Net()
    blocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(2))
    parts = {"patch_embed": nn.Linear(1, 1), "blocks": blocks, "norm": nn.LayerNorm(1)}
    net.backbone = nn.ModuleDict(parts)
    names = {parameter: name for name, parameter in net.named_parameters()}
    rates = {
        names[parameter].removeprefix("backbone.").rpartition(".")[0]: group["lr"]
        for group in optimization(net, layer_decay=0.5)._optimizer.param_groups
        for parameter in group["params"]
    }
    assert rates == pytest.approx(
        {"patch_embed": 0.0125, "blocks.0": 0.025, "blocks.1": 0.05, "norm": 0.1, "head": 0.2}
    )


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_continuing_from_a_saved_state_is_exact(name):
    settings = {"name": name, "momentum": 0.9, "weight_decay": 0.01, "power": 0.9, "warmup": 2}

    def trained(interrupted):
        net = Net()
        optimized = optimization(net, **settings)
        for step in range(4):
            if interrupted and step == 2:
                states, net = (net.state_dict(), optimized.state_dict()), Net()
                optimized = optimization(net, **settings)
                net.load_state_dict(states[0])
                optimized.load_state_dict(states[1])
            update(optimized, net.loss().square())
        return net.head.weight

    assert torch.equal(trained(interrupted=True), trained(interrupted=False))


def test_the_average_follows_the_weights_and_is_restored():
    net, average = Net(), Net()
    sgd = optimization(net, 10, average=average)
    expected = 1.0
    for done in range(1, 4):
        update(sgd, net.loss())
        kept = min(0.6, 1 - 1 / (done + 1))
        expected = kept * expected + (1 - kept) * net.head.weight.item()
        assert average.head.weight.item() == pytest.approx(expected)
    other = Net()
    optimization(Net(), 10, average=other).load_state_dict(sgd.state_dict())
    assert torch.equal(other.head.weight, average.head.weight)


def test_a_gradient_that_is_not_finite_changes_no_weight():
    net = Net()
    sgd = optimization(net, momentum=0.9)
    infinite_slope = (net.head.weight.sum() - 1).sqrt()
    assert update(sgd, net.loss() + infinite_slope) == 2  # the loss itself is finite
    assert [weight.item() for weight in net.parameters()] == [1, 1]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("skipped", [[0], [1], [0, 3]])
def test_a_step_that_the_scaler_skips_leaves_no_trace(name, skipped):
    """Weights and optimizer state are those of torch's plain optimizer without these steps."""
    net, plain = Net(), Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    settings = {"lr": 0.1, "head_multiple": 1, "momentum": 0.9, "weight_decay": 0.01}
    scaled = optimization(net, iterations=9, scaler=scaler, name=name, **settings)
    if name == "sgd":
        expected = torch.optim.SGD(plain.parameters(), momentum=0.9, weight_decay=0.01, fused=False)
    else:
        expected = torch.optim.AdamW(plain.parameters(), weight_decay=0.01, fused=False)
    for step in range(6):
        rate = scaled.lr
        infinite_slope = (net.head.weight - net.head.weight.detach()).sqrt().sum()
        loss = net.loss().square()
        assert update(scaled, loss + infinite_slope if step in skipped else loss) is None
        if step not in skipped:
            for group in expected.param_groups:
                group["lr"] = rate
            expected.zero_grad()
            plain.loss().square().backward()
            expected.step()
        torch.testing.assert_close(list(net.parameters()), list(plain.parameters()))
    states = zip(scaled._optimizer.state.values(), expected.state.values(), strict=True)
    for found, wanted in states:
        torch.testing.assert_close(found, wanted)


def test_fp16_skips_a_gradient_that_overflows_and_stops_when_all_do():
    net = Net()
    sgd = optimization(net, iterations=99, scaler=torch.amp.GradScaler("cpu"))
    assert update(sgd, net.loss() * 1e36) is None  # scaled by 2 ** 16 it overflows
    assert net.head.weight.item() == 1.0
    assert update(sgd, net.loss()) is None
    assert net.head.weight.item() < 1.0
    infinite = [
        update(sgd, net.loss() + (net.head.weight - net.head.weight.detach()).sqrt().sum())
        for _ in range(20)
    ]
    assert infinite[0] is None
    assert infinite[-1] is not None


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_goes_on_to_the_same_bits(name, tmp_path):
    """Weights, running statistics and the optimizer's state, through a file."""

    scaler = Device("cpu", "fp32").scaler()

    def begin():
        net = family(name).train()
        return net, Optimization(net, OptimizerSection(name="adamw"), 9, scaler)

    def step(net, optimization, number):
        torch.manual_seed(number)  # of dropout, too
        optimization.backward(net(torch.randn(2, 3, 64, 64)).logits.square().mean())
        optimization.step()

    net, optimization = begin()
    step(net, optimization, 0)
    states = {"net": net.state_dict(), "optimization": optimization.state_dict()}
    checkpoint.save(tmp_path / "resume.pth", states)
    step(net, optimization, 1)
    again, resumed = begin()
    states = checkpoint.load(tmp_path / "resume.pth")
    again.load_state_dict(states["net"])
    resumed.load_state_dict(states["optimization"])
    step(again, resumed, 1)
    assert same(net.state_dict(), again.state_dict())
