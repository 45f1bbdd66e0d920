import pytest
import torch
from torchvision.models import resnet as torchvision_resnet

from model import BACKBONES, NETWORKS, build_model
from model.resnet import ResNet
from utils.errors import UserError

PAIRS = [(name, backbone) for name in NETWORKS for backbone in BACKBONES]
STRIDES = [8, 16, 32]


@pytest.mark.parametrize(("name", "backbone"), PAIRS)
def test_network_contract(name, backbone):
    """Any pair, any size: logits at input size, features below them, a gradient everywhere."""
    net = build_model(name, backbone, num_classes=5, output_stride=16)
    images = torch.randn(2, 3, 49, 67)
    output = net(images)
    assert output.logits.shape == (2, 5, 49, 67)
    assert output.logits.dtype == torch.float32
    assert output.features.shape[0] == 2
    output.logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    net.eval()
    with torch.inference_mode():
        torch.testing.assert_close(net.extract(images), net(images).features)
        alone = net(images[:1]).logits
        torch.testing.assert_close(net(images).logits[:1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", STRIDES)
def test_output_stride(stride):
    low_level, last = ResNet("resnet18", stride)(torch.randn(1, 3, 64, 96))
    assert low_level.shape == (1, 64, 16, 24)
    assert last.shape == (1, 512, 64 // stride, 96 // stride)


@pytest.mark.parametrize(
    ("stride", "replaced"), [(8, [False, True, True]), (16, [False, False, True])]
)
def test_dilated_bottlenecks_are_torchvisions(stride, replaced):
    ours = ResNet("resnet50", stride).eval()
    theirs = torchvision_resnet.resnet50(replace_stride_with_dilation=replaced).eval()
    theirs.fc = torch.nn.Identity()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images)[1].mean(dim=(2, 3)), theirs(images))


def test_dilated_basic_blocks_compute_the_strided_network_densely():
    """Dilation samples the dilated map where the strided network has its map."""
    strided, dilated = ResNet("resnet18", 32).eval(), ResNet("resnet18", 8).eval()
    dilated.load_state_dict(strided.state_dict())
    images = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        coarse, dense = strided(images)[1], dilated(images)[1][:, :, ::4, ::4]
    inside = slice(3, 5)  # away from the padding, which differs
    torch.testing.assert_close(
        coarse[..., inside, inside], dense[..., inside, inside], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(("backbone", "millions"), [("resnet50", 40.35), ("resnet101", 59.34)])
def test_parameter_counts_of_the_published_networks(backbone, millions):
    with torch.device("meta"):
        net = build_model("deeplabv3plus", backbone, num_classes=21)
    count = sum(parameter.numel() for parameter in net.parameters())
    assert round(count / 1e6, 2) == millions


def test_state_dict_has_the_published_keys():
    with torch.device("meta"):
        keys = build_model("deeplabv3plus", "resnet101", num_classes=21).state_dict().keys()
        backbone = torchvision_resnet.resnet101().state_dict().keys()
    assert len(keys) == 680
    assert {key.removeprefix("backbone.") for key in keys if key.startswith("backbone.")} == {
        key for key in backbone if not key.startswith("fc.")
    }
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    blocks = ["head.b0", "head.b1", "head.b2", "head.b3", "head.project", "reduce"]
    pairs = [(f"{block}.0", f"{block}.1") for block in blocks]
    pairs += [("head.b4.gap.1", "head.b4.gap.2"), ("fuse.0", "fuse.1"), ("fuse.3", "fuse.4")]
    expected = {f"{conv}.weight" for conv, _ in pairs}
    expected |= {f"{bn}.{part}" for _, bn in pairs for part in norm}
    expected |= {"classifier.weight", "classifier.bias"}
    assert {key for key in keys if not key.startswith("backbone.")} == expected


def test_pyramid_rates_follow_the_output_stride():
    for stride, rates in ((8, [12, 24, 36]), (16, [6, 12, 18])):
        head = build_model("deeplabv3plus", "resnet18", 2, stride).head
        assert [branch[0].dilation[0] for branch in (head.b1, head.b2, head.b3)] == rates


def test_backbone_weights_load(tmp_path):
    source = torchvision_resnet.resnet18()  # with fc, as torchvision's files have it
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    net = build_model("deeplabv3plus", "resnet18", 3, pretrained=tmp_path / "weights.pth")
    torch.testing.assert_close(net.backbone.conv1.weight, source.conv1.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("unet", "resnet18", 3), "model.name: 'unet' is not one of deeplabv3plus"),
        (("deeplabv3plus", "vgg", 3), "model.backbone: 'vgg' is not one of resnet18"),
        (("deeplabv3plus", "resnet18", 3, 4), "model.output_stride: 4 is not one of 8, 16, 32"),
        (
            ("deeplabv3plus", "resnet18", 3, 8, "nowhere.pth"),
            "nowhere.pth: no weights for resnet18",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        build_model(*arguments)
