import pytest
import torch
from torch import nn

from model import BACKBONES, NETWORKS, build_model
from model.ops.frozen import frozen
from utils.device import Device

PAIRS = [("deeplabv3plus", backbone, "plain") for backbone in ("resnet18", "xception65")]
PAIRS += [(name, "resnet50", "deep") for name in NETWORKS]


def with_lived_in_norms(net):
    """Give every batch norm statistics and weights that fresh ones lack."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_var, module.weight.data):
                values.uniform_(0.5, 1.5)
            for values in (module.running_mean, module.bias.data):
                values.normal_(std=0.1)
    return net


@pytest.mark.parametrize(("name", "backbone", "stem"), PAIRS)
def test_computes_the_same_in_float64(name, backbone, stem):
    assert backbone in BACKBONES
    torch.manual_seed(0)
    net = build_model(name, backbone, 5, 16, stem=stem)
    net = with_lived_in_norms(net).double().eval()
    copy = frozen(net, Device("cpu", "fp32"))
    images = torch.randn(1, 3, 65, 49, dtype=torch.float64)
    with torch.no_grad():
        expected, found = net(images), copy(images)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_leaves_the_network_as_it_was():
    net = build_model("pspnet", "resnet18", 3).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    copy = frozen(net, Device("cpu", "bf16"))
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not copy.training
    assert not any(parameter.requires_grad for parameter in copy.parameters())


def test_folds_every_norm_of_the_plain_stem_and_casts_every_convolution():
    copy = frozen(build_model("deeplabv3plus", "resnet18", 3), Device("cpu", "bf16"))
    assert not [module for module in copy.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {parameter.dtype for parameter in copy.parameters()} == {torch.bfloat16}
