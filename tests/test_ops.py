import gc
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from networks import FAMILIES, family, with_statistics
from torch import nn

from model import SegmentationOutput, build_model
from model.ops.bilinear import pull_back, resize_by_products
from model.ops.dilated import DilatedConv2d, DilatedDepthwiseConv2d
from model.ops.frozen import freeze
from utils.device import Device


def test_pull_back_is_the_adjoint_of_the_resize():
    """<U x, m> = <x, U' m> for any x and m; and sums stay, since every row of U sums to 1."""
    x, masks = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 17, 26).double()
    resized = F.interpolate(x[:, None], (17, 26), mode="bilinear", align_corners=False)[:, 0]
    pulled = pull_back(masks, (5, 7))
    torch.testing.assert_close((resized * masks).sum(), (x * pulled).sum())
    torch.testing.assert_close(pulled.sum(dim=(1, 2)), masks.sum(dim=(1, 2)))


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(17, 26), (4, 3), (5, 7), (1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_products_resize_as_torch_does_and_so_do_their_gradients(size, align_corners, layout):
    maps = torch.randn(2, 3, 5, 7, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    weight = torch.randn(2, 3, *size, dtype=torch.float64)
    answers = []
    for form in (resize_by_products, lambda m, s, a: F.interpolate(m, s, None, "bilinear", a)):
        resized = form(maps, size, align_corners)
        answers.append((resized, *torch.autograd.grad(resized, maps, weight)))
    torch.testing.assert_close(*answers)


def test_products_keep_the_dtype_and_add_in_float32():
    maps = torch.randn(1, 2, 9, 9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        resized = resize_by_products(maps, (33, 33), True)
    assert resized.dtype == torch.bfloat16
    expected = resize_by_products(maps.float(), (33, 33), True).bfloat16()
    assert torch.equal(resized, expected)


def gradients(forward, conv, maps):
    """Outcome, and gradients of maps and parameters, for one fixed direction."""
    outcome = forward(maps)
    direction = torch.linspace(-1, 1, outcome.numel(), dtype=outcome.dtype).view_as(outcome)
    return outcome, *torch.autograd.grad(outcome, [maps, *conv.parameters()], direction)


def convolution(kernel, rate, bias):
    if kernel == "dense":
        return DilatedConv2d(5, 4, rate, bias)
    shape = {"padding": rate * (kernel // 2), "dilation": rate, "groups": 5, "bias": bias}
    plain = nn.Conv2d(5, 5, kernel, **shape)
    assert DilatedDepthwiseConv2d.can_replace(plain) == (rate > 1)
    ours = DilatedDepthwiseConv2d.of(plain)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    return ours


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(7, 4), (1, 1), (5, 12), (3, 40)])
@pytest.mark.parametrize("rate", [1, 2, 6, 36])
@pytest.mark.parametrize("kernel", ["dense", 3, 5, 7])
def test_equals_the_convolution_in_float64(kernel, rate, size, bias):
    torch.manual_seed(0)
    conv = convolution(kernel, rate, bias).double()
    maps = torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True)
    expected = gradients(lambda x: nn.Conv2d.forward(conv, x), conv, maps)
    for one, other in zip(gradients(conv, conv, maps), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("key", "value"),
    [("stride", 2), ("padding", 1), ("groups", 3), ("groups", 1), ("kernel_size", (5, 3))],
)
def test_other_convolutions_stay_as_they_are(key, value):
    shape = {"kernel_size": 5, "padding": 4, "dilation": 2, "groups": 6, key: value}
    assert not DilatedDepthwiseConv2d.can_replace(nn.Conv2d(6, 6, **shape))


def test_autocast_rounds_products_not_their_sum():
    torch.manual_seed(0)
    conv = DilatedConv2d(64, 8, rate=3)
    maps = torch.randn(2, 64, 20, 20)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = conv(maps), nn.Conv2d.forward(conv, maps)
    assert ours.dtype == torch.bfloat16
    weight, rounded = conv.weight.detach().bfloat16().double(), maps.bfloat16().double()
    exact = F.conv2d(rounded, weight, padding=3, dilation=3)
    error, plain_error = ((x.double() - exact).abs().max() for x in (ours, theirs))
    assert error <= 2 * plain_error


def test_keys_and_first_numbers_are_those_of_the_convolution():
    torch.manual_seed(3)
    ours = DilatedConv2d(6, 4, rate=2).state_dict()
    torch.manual_seed(3)
    theirs = nn.Conv2d(6, 4, 3, padding=2, dilation=2, bias=False).state_dict()
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["weight"], theirs["weight"])


def assert_same(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def published(name):
    torch.manual_seed(0)
    return build_model(name, "resnet50", 5, 16, stem="deep")


NETWORKS = {name: partial(family, name) for name in FAMILIES}
NETWORKS |= {name: partial(published, name) for name in ("deeplabv3plus", "pspnet", "deeplabv2")}


@pytest.mark.parametrize("name", NETWORKS)
def test_computes_the_same_as_in_eval_mode(name):
    """To 1e-12 in float64; in float32 to 1e-5 of the largest logit, or as near as eval mode is."""
    net, images = with_statistics(NETWORKS[name]()).eval(), torch.randn(1, 3, 65, 49)
    device, exact = Device("cpu", "fp32"), deepcopy(net).double()
    with torch.no_grad():
        plain, folded, expected = net(images), freeze(net, device)(images), exact(images.double())
        assert_same(freeze(exact, device)(images.double()), expected, 1e-12)
    errors = [(output.logits - expected.logits).abs().max() for output in (folded, plain)]
    assert errors[0] <= max(2 * errors[1], 1e-5 * expected.logits.abs().max())


def test_the_network_itself_is_frozen_and_none_is_left_beside_it():
    def live():
        gc.collect()
        return sum(type(each) is type(net) for each in gc.get_objects())

    net = build_model("pspnet", "resnet18", 3).train()
    before = live()
    assert freeze(net, Device("cpu", "bf16")) is net
    assert live() == before
    assert not any(module._forward_hooks for module in net.modules())
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("name", ["ResNet", "Xception", "EfficientNet", "MobileNetV3", "ViT"])
def test_folds_every_norm_that_a_convolution_feeds(name):
    copy = freeze(with_statistics(family(name)), Device("cpu", "bf16"))
    assert not [module for module in copy.modules() if isinstance(module, nn.BatchNorm2d)]
    convolutions = [module for module in copy.modules() if isinstance(module, nn.Conv2d)]
    assert {convolution.weight.dtype for convolution in convolutions} == {torch.bfloat16}


class Odd(nn.Module):
    """A norm that a convolution feeds in one way of several, none of which may be folded."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.norm, self.way = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), way

    def forward(self, images):
        maps = self.conv(images)
        if self.way == "changed in place":
            maps.relu_()
        elif self.way == "another tensor":
            maps = 2 * maps
        logits = self.norm(maps)
        return SegmentationOutput(logits, maps if self.way == "used twice" else logits)


@pytest.mark.parametrize("way", ["changed in place", "another tensor", "used twice"])
def test_folds_nothing_else(way):
    net = with_statistics(Odd(way)).eval()
    copy, images = freeze(deepcopy(net), Device("cpu", "fp32")), torch.randn(2, 3, 9, 9)
    assert isinstance(copy.norm, nn.BatchNorm2d)
    with torch.no_grad():
        assert_same(copy(images), net(images), 1e-6)
