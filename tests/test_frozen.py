from copy import deepcopy
from functools import partial

import pytest
import torch
from networks import FAMILIES, family, with_statistics
from torch import nn

from model import SegmentationOutput, build_model
from model.ops.frozen import frozen
from utils.device import Device


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
    """To 1e-12 in float64; in float32 as near to that as eval mode itself, whose error is 3e-5."""
    net, images = with_statistics(NETWORKS[name]()).eval(), torch.randn(1, 3, 65, 49)
    device, exact = Device("cpu", "fp32"), deepcopy(net).double()
    with torch.no_grad():
        plain, folded, expected = net(images), frozen(net, device)(images), exact(images.double())
        assert_same(frozen(exact, device)(images.double()), expected, 1e-12)
    errors = [(output.logits - expected.logits).abs().max() for output in (folded, plain)]
    assert errors[0] <= 2 * errors[1]


def test_leaves_the_network_as_it_was():
    net = build_model("pspnet", "resnet18", 3).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    copy = frozen(net, Device("cpu", "bf16"))
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())
    assert not copy.training
    assert not any(parameter.requires_grad for parameter in copy.parameters())


@pytest.mark.parametrize("name", ["ResNet", "Xception", "EfficientNet", "MobileNetV3", "ViT"])
def test_folds_every_norm_that_a_convolution_feeds(name):
    copy = frozen(with_statistics(family(name)), Device("cpu", "bf16"))
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
    copy, images = frozen(net, Device("cpu", "fp32")), torch.randn(2, 3, 9, 9)
    assert isinstance(copy.norm, nn.BatchNorm2d)
    with torch.no_grad():
        assert_same(copy(images), net(images), 1e-6)
