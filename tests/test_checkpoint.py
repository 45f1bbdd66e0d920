import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import same
from torch import nn

from model import build_model
from utils import checkpoint
from utils.errors import UserError


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize("wrap", [dict, lambda w: {"model": w, "epoch": 3}], ids=["bare", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_formats_of_the_family_load(tmp_path, wrap, prefix):
    source, net = network(), network()
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
    path, weights = tmp_path / f"net.{suffix}", network().state_dict()
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
    torch.save({"model": network().state_dict(), "previous_best": np.float64(70.25)}, path)
    if name == "numpy.core.multiarray":
        rename_in(path, b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert checkpoint.load(path)["previous_best"] == 70.25
    checkpoint.load_weights(network(), path)


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
    with pytest.raises(UserError, match="not a whole checkpoint of tensors"):
        checkpoint.load(tmp_path / "net.pth")
    assert not (tmp_path / "owned").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "net.pth"
    checkpoint.save(path, {"epoch": 1})
    with pytest.raises(AttributeError):
        checkpoint.save(path, {"epoch": lambda: 2})  # cannot be pickled
    assert checkpoint.load(path) == {"epoch": 1}
