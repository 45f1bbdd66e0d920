import copy
import resource
from functools import partial

import pytest
import torch
from conftest import refusal
from networks import FAMILIES, family, with_statistics
from timm.layers import AvgPool2dSame, Conv2dSame
from torch import nn
from torch.torch_version import TorchVersion

from model import SegmentationOutput, build_model
from model.networks.deeplabv2 import DeepLabV2
from model.networks.resnet import ResNet
from utils.errors import UserError
from utils.export import ONNX_SINCE, TOLERANCE, _GridMeans, _Same, export

UNSEEN = (4, 3, 57, 91)  # neither the traced size nor one that export checks


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """Read it, don't spoil it."""
    return with_statistics(family("ResNet"))


def logits_of(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(net).eval()(images).logits


def answer_of(path, images: torch.Tensor) -> torch.Tensor:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def import_packages(suffix) -> None:
    if suffix == ".onnx" and torch.__version__ < ONNX_SINCE:
        pytest.skip(f"ONNX needs torch {ONNX_SINCE}")
    for package in ("onnx", "onnxscript", "onnxruntime") if suffix == ".onnx" else ():
        pytest.importorskip(package, reason=f"{package} is optional: only ONNX export needs it")


def assert_agrees(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.01  # otherwise agreeing means little
    limit = TOLERANCE * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, atol=limit, rtol=0)


@pytest.mark.parametrize("suffix", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_round_trip_at_another_size(network, tmp_path, capfd, suffix):
    import_packages(suffix)
    path = tmp_path / "new" / f"model{suffix}"
    assert export(network, path) < 1e-4
    assert list(path.parent.iterdir()) == [path]  # weights inside
    assert capfd.readouterr() == ("", "")
    images = torch.randn(UNSEEN)
    assert_agrees(answer_of(path, images), logits_of(network, images))


@pytest.mark.slow
def test_a_full_disk_is_told_and_leaves_no_file(network, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # bytes; less than the weights
    try:
        line = refusal(export, network, tmp_path / "model.pt2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert line.startswith(f"{tmp_path / 'model.pt2'}: cannot write this file (File too large)")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_onnx_names_its_input_output_and_free_axes(tmp_path):
    import_packages(".onnx")
    import onnxruntime

    net = DeepLabV2(ResNet("resnet18", 32), 5, 32)
    export(net, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type) == ("images", "tensor(float)")
    assert images.shape == ["batch", 3, "height", "width"]
    assert (logits.name, logits.type) == ("logits", "tensor(float)")
    assert logits.shape == ["batch", 5, "height", "width"]


OTHERS = {name: partial(family, name) for name in FAMILIES if name != "ResNet"}
OTHERS |= {head: partial(build_model, head, "resnet18", 5, 16) for head in ("pspnet", "deeplabv2")}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_export_too(name, suffix, tmp_path):
    import_packages(suffix)
    torch.manual_seed(0)
    net = with_statistics(OTHERS[name]())
    path = tmp_path / f"model{suffix}"
    export(net, path)
    images = torch.randn(UNSEEN)
    assert_agrees(answer_of(path, images), logits_of(net, images))


@pytest.mark.parametrize("size", [(33, 17), (6, 7)])
@pytest.mark.parametrize(
    "layer",
    [
        Conv2dSame(3, 6, 3, stride=2),
        Conv2dSame(3, 6, 5, stride=2, groups=3),
        Conv2dSame(3, 6, 2, dilation=2),
        AvgPool2dSame(2, stride=1),
        AvgPool2dSame(3, stride=2, count_include_pad=False),
    ],
)
def test_same_padding_is_timms(layer, size):
    maps = torch.randn(2, 3, *size)
    torch.testing.assert_close(_Same(layer)(maps), layer(maps))


def test_the_callers_network_stays_as_it_is(network, tmp_path):
    net = copy.deepcopy(network).to(torch.float64, memory_format=torch.channels_last).train()
    net.head.eval()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    export(net, tmp_path / "model.pt2")
    assert [m.training for m in net.modules()] == modes
    assert all(parameter.requires_grad for parameter in net.parameters())
    after = net.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=0)  # and the dtype
        assert after[key].stride() == value.stride()


class Pointwise(nn.Module):
    """Logits are the channels, times three."""

    def forward(self, images):
        return SegmentationOutput(3 * images, images)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda images: 3 * images + 0.5, "differ from the network's by 0.5, more than 0.001"),
        (lambda images: images * torch.nan, "differ from the network's by nan"),
        (lambda images: images[:, :, :-1], "fails on images .*must match"),
    ],
)
def test_a_file_that_disagrees_is_not_kept(answer, message, tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_text("the old file")
    monkeypatch.setattr("utils.export._read_pt2", lambda _: answer)
    with pytest.raises(UserError, match=rf"model.pt2: not written, .*{message}"):
        export(Pointwise(), path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_text() == "the old file"


@pytest.mark.parametrize("name", ["model.pth", "model"])
def test_another_suffix_is_named(name, tmp_path):
    with pytest.raises(UserError, match=f"{name}: export writes .onnx, .pt2, .*is none of them"):
        export(Pointwise(), tmp_path / name)


def test_a_torch_that_is_too_old_for_onnx_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.6.0"))
    with pytest.raises(UserError, match=r"needs torch 2.7 or newer, this is 2.6.0; install that"):
        export(Pointwise(), tmp_path / "model.onnx")


def test_missing_packages_are_named(tmp_path, monkeypatch):
    present = {"onnx"}
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.7.0"))
    monkeypatch.setattr("utils.export.find_spec", lambda name: name if name in present else None)
    with pytest.raises(UserError, match=r"pip install onnxscript onnxruntime$"):
        export(Pointwise(), tmp_path / "model.onnx")
    export(Pointwise(), tmp_path / "model.pt2")  # needs none of them


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (5, 7), (6, 12), (13, 31)])
@pytest.mark.parametrize("grid", [(1, 2), (3, 3), (6, 5)])
def test_grid_means_are_adaptive_pooling(grid, size):
    maps = torch.randn(2, 3, *size)
    expected = nn.AdaptiveAvgPool2d(grid)(maps)
    torch.testing.assert_close(_GridMeans(*grid)(maps), expected, atol=1e-6, rtol=1e-5)
