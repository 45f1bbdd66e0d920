from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from networks import FAMILIES, family
from torchvision.models import resnet as torchvision_resnet

from model import (
    BACKBONES,
    NETWORKS,
    STEMS,
    build_model,
    largest_stride,
    patch_size_of,
    refuse_crop,
)
from model.networks.resnet import ResNet
from model.networks.timm_encoders import TimmEncoder
from model.networks.xception import Xception65
from utils.errors import UserError

SWIN = "swin_tiny_patch4_window7_224"
HEADS = tuple(name for name in NETWORKS if name != "dpt")
STEMS_OF = [(b, stem) for b in BACKBONES for stem in STEMS if b != "xception65" or stem == "plain"]
ALL = [(name, backbone, stem) for name in HEADS for backbone, stem in STEMS_OF]


def network(name, backbone, stem="plain", num_classes=5, stride=16):
    return build_model(name, backbone, num_classes, stride, stem=stem)


@pytest.mark.parametrize(("name", "backbone", "stem"), ALL)
def test_every_pair_gives_logits_and_features(name, backbone, stem):
    """Any pair, any size, there and back: shapes alone, which take no time."""
    with torch.device("meta"):
        net = network(name, backbone, stem)
        output = net(torch.empty(2, 3, 97, 135))
        output.logits.square().mean().backward()
    assert all(p.grad.shape == p.shape for p in net.parameters())
    assert output.logits.shape == (2, 5, 97, 135)
    height, width = output.features.shape[2:]
    stride = 4 if name == "deeplabv3plus" else 16
    assert (height, width) == (-(-97 // stride), -(-135 // stride))


CONTRACT = {name: partial(family, name) for name in FAMILIES}
CONTRACT |= {name: partial(network, name, "resnet50") for name in ("pspnet", "deeplabv2")}


@pytest.mark.parametrize("name", CONTRACT)
def test_network_contract(name):
    """A gradient everywhere; features as ``extract`` gives them; images do not see each other."""
    net = CONTRACT[name]()
    images = torch.randn(2, 3, 49, 67)
    output = net(images)
    assert output.logits.dtype == torch.float32
    output.logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    net.eval()
    with torch.inference_mode():
        both = net(images)
        torch.testing.assert_close(net.extract(images), both.features)
        alone = net(images[:1]).logits
        torch.testing.assert_close(both.logits[:1], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_any_size_down_to_33_by_17(name, autocast):
    """Features cover the image at stride 4, rounded up; in bf16 logits stay float32."""
    net = family(name).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        for size in ((33, 17), (49, 130), (64, 96)):
            output = net(torch.randn(1, 3, *size))
            assert output.logits.dtype == torch.float32
            assert output.logits.shape == (1, 5, *size)
            assert output.features.shape[2:] == tuple(-(-length // 4) for length in size)


@pytest.mark.parametrize("backbone", ["convnext_atto", "mobilenetv3_small_050"])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_encoders_of_timm_divide_sizes_rounding_up(backbone, stride):
    with torch.device("meta"):
        encoder = TimmEncoder(backbone, stride)
        maps = encoder(torch.empty(1, 3, 65, 130))
    assert tuple(part.shape[1] for part in maps) == encoder.channels
    sizes = [tuple(part.shape[2:]) for part in maps]
    assert sizes == [(17, 33), tuple(-(-length // stride) for length in (65, 130))]


def test_a_vision_transformer_pads_and_cuts_back():
    """40 x 54 is padded to 48 x 64 with zeros, and the features are cut to a quarter of it."""
    net = build_model("dpt", "timm/vit_tiny_patch16_224", 3).eval()
    images = torch.randn(1, 3, 40, 54)
    with torch.no_grad():
        padded = net.extract(F.pad(images, (0, 10, 0, 8)))  # to 48 x 64
        found = net.extract(images)
    assert found.shape[2:] == (10, 14)
    torch.testing.assert_close(found[..., :9, :13], padded[..., :9, :13])


@pytest.mark.parametrize(
    ("backbone", "patch", "stride"),
    [
        ("resnet18", None, 32),
        ("xception65", None, 16),
        ("timm/convnext_atto", None, 32),
        ("timm/vit_small_patch14_reg4_dinov2.lvd142m", 14, 14),
        ("timm/vit_small_patch16_dinov3.lvd1689m", 16, 16),
    ],
)
def test_crops_are_multiples_of_the_patch(backbone, patch, stride):
    assert largest_stride(backbone) == stride
    assert patch_size_of(backbone) == patch
    if patch is None:
        refuse_crop(backbone, 321)
        return
    with torch.device("meta"):
        net = build_model("dpt", backbone, 5)
    assert net(torch.empty(1, 3, 98, 120, device="meta")).logits.shape == (1, 5, 98, 120)
    refuse_crop(backbone, 8 * patch)
    with pytest.raises(UserError, match=rf"augment.crop_size: 321 .* {patch} pixels .* set \d+ or"):
        refuse_crop(backbone, 321)


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


def test_deep_stem_differs_where_the_published_one_does():
    with torch.device("meta"):
        plain = ResNet("resnet101", 16).state_dict()
        deep = ResNet("resnet101", 16, deep_stem=True).state_dict()
    changed = {k for k in plain.keys() | deep.keys() if k not in plain or k not in deep}
    changed |= {k for k in plain.keys() & deep.keys() if plain[k].shape != deep[k].shape}
    beyond = {k for k in changed if not k.startswith(("conv1.", "bn1."))}
    assert beyond == {"layer1.0.conv1.weight", "layer1.0.downsample.0.weight"}
    convs = [deep[f"conv1.{place}.weight"].shape[:2] for place in (0, 3, 6)]
    assert convs == [(64, 3), (64, 64), (128, 64)]


def test_xception_has_the_published_keys():
    with torch.device("meta"):
        net = Xception65(16)
    keys = net.state_dict().keys()
    count = sum(parameter.numel() for parameter in net.parameters())
    assert len(keys) == 792
    assert round(count / 1e6, 2) == 37.87
    assert {key for key in keys if "skip" in key and key.endswith("weight")} == {
        f"block{number}.{part}.weight" for number in (1, 2, 3, 20) for part in ("skip", "skipbn")
    }
    for key in ("conv2.weight", "block7.sepconv2.depthwise.weight", "conv5.pointwise.weight"):
        assert key in keys
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {(norm.momentum, norm.eps) for norm in norms} == {(3e-4, 1e-5)}


@pytest.mark.parametrize(
    ("encoder", "channels", "strides"),
    [(partial(ResNet, "resnet18"), (64, 512), (8, 16, 32)), (Xception65, (256, 2048), (8, 16))],
)
def test_output_stride(encoder, channels, strides):
    for stride in strides:
        with torch.device("meta"):
            net = encoder(stride)
            low_level, last = net(torch.empty(1, 3, 128, 64))
        assert low_level.shape == (1, channels[0], 32, 16)
        assert last.shape == (1, channels[1], 128 // stride, 64 // stride)
        if encoder is Xception65:
            assert net.block4.sepconv1.depthwise.dilation == (16 // stride, 16 // stride)
            assert net.block3.sepconv1.depthwise.dilation == (1, 1)


def test_rates_and_pyramids_are_the_published_ones():
    with torch.device("meta"):
        pspnet, deeplab = network("pspnet", "resnet50"), network("deeplabv2", "resnet50")
    for stride, rates in ((8, [12, 24, 36]), (16, [6, 12, 18])):
        head = build_model("deeplabv3plus", "resnet18", 2, stride).head
        assert [branch[0].dilation[0] for branch in (head.b1, head.b2, head.b3)] == rates
    assert [level[0].output_size for level in pspnet.pyramid] == [1, 2, 3, 6]
    assert [branch.dilation[0] for branch in deeplab.classifier] == [6, 12, 18, 24]


def test_logits_of_deeplabv2_are_the_sum_of_its_branches():
    net = network("deeplabv2", "resnet18").eval()
    images = torch.randn(1, 3, 33, 33)
    with torch.inference_mode():
        output = net(images)
        branches = torch.stack([branch(output.features) for branch in net.classifier])
    expected = F.interpolate(branches.sum(0), (33, 33), mode="bilinear", align_corners=True)
    torch.testing.assert_close(output.logits, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("unet", "resnet18", 3), "model.name: 'unet' is not one of deeplabv3plus"),
        (("deeplabv3plus", "vgg", 3), "model.backbone: 'vgg' is not one of resnet18"),
        (("deeplabv3plus", "resnet18", 3, 4), "model.output_stride: '4' is not one of 8, 16, 32"),
        (
            ("deeplabv3plus", "timm/convnext_atoo", 3),
            "model.backbone: timm .* has no 'convnext_atoo'; near it: convnext_atto",
        ),
        (("deeplabv3plus", "timm/resnet18.no_tag", 3), "no 'resnet18.no_tag'; near it: resnet18"),
        (("deeplabv3plus", "timm/pvt_v2_b0", 3, 16), "pvt_v2_b0 ends at stride 32, not at 16"),
        (("pspnet", "timm/vit_tiny_patch16_224", 3), "has no map at stride 4 .* model.name=dpt"),
        (("pspnet", f"timm/{SWIN}", 3, 32), f"{SWIN} takes images of its own size alone"),
        (("dpt", "resnet18", 3), "dpt takes a plain vision transformer, not resnet18"),
        (("dpt", "timm/convnext_atto", 3), "convnext_atto is not a plain vision transformer"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        build_model(*arguments)
