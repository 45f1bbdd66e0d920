"""Networks as files that run without this project: ONNX, or torch's own .pt2."""

import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AvgPool2dSame, Conv2dSame
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import write_atomically

PACKAGES = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".pt2": ()}  # beyond requirements.txt
ONNX_SINCE = "2.7"  # of torch; 2.6 does not trace a resize to the size of another map
TOLERANCE = 1e-4  # of logits; where they grow beyond 1, of the largest
_EXAMPLE = (2, 3, 96, 128)  # traced; what is checked has other sizes, odd ones too
_CHECKED = ((1, 3, 65, 97), (3, 3, 80, 49), (2, 3, 64, 64))
_AXES = {0: "batch", 2: "height", 3: "width"}
Run = Callable[[Tensor], Tensor]


def export(net: nn.Module, path: Path) -> float:
    """Write a network for use elsewhere, and check the file against it on random images.

    The file maps ``images``, (B, 3, H, W) float32, normalised, to ``logits``, (B, C, H, W)
    float32; B, H and W are free, except that a .pt2 file refuses images that are no larger than
    the output stride. It holds the network in eval mode and all of its weights.

    Args:
        net: returns ``SegmentationOutput``; stays as it is: a copy goes to the CPU, in float32.
        path: ``.onnx`` for ONNX, ``.pt2`` for ``torch.export.load``.

    Returns:
        The largest absolute difference between logits of the file and of the network.

    Raises:
        UserError: another suffix, a missing package, a torch that is too old for ONNX, a network
            that ONNX cannot express, or a file that disagrees with the network, which is then not
            kept.
    """
    _check_request(path)
    plain = _Logits(copy.deepcopy(net)).to("cpu", torch.float32).eval()
    plain.to(memory_format=torch.contiguous_format).requires_grad_(False)
    write, read = (_write_onnx, _read_onnx) if path.suffix == ".onnx" else (_write_pt2, _read_pt2)
    difference = torch.nan

    def write_and_check(partial: Path) -> None:
        nonlocal difference
        with _quiet():
            write(plain, partial)
            difference = _largest_difference(plain, read(partial), path)

    write_atomically(path, write_and_check)
    return difference


class _Logits(nn.Module):
    """A network without its features."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).logits


class _GridMeans(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as two matrix products, which ONNX has at sizes not known yet.

    Means over a grid of cells are separable: cell i of n covers the rows from floor(i h / n) to
    ceil((i + 1) h / n), and the columns likewise.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns

    @classmethod
    def of(cls, pooling: nn.AdaptiveAvgPool2d) -> "_GridMeans":
        """Build the same grid."""
        size = pooling.output_size
        return cls(size, size) if isinstance(size, int) else cls(*size)

    def forward(self, maps: Tensor) -> Tensor:
        """Average (B, C, h, w) to (B, C, rows, columns)."""
        height, width = maps.shape[-2:]
        return self._cells(self.rows, height) @ maps @ self._cells(self.columns, width).T

    @staticmethod
    def _cells(count: int, length: int) -> Tensor:
        """(count, length): the weight of each position in each cell's mean."""
        cell, position = torch.arange(count).unsqueeze(1), torch.arange(length).unsqueeze(0)
        # position >= floor(cell length / count), < ceil((cell + 1) length / count), undivided
        inside = ((position + 1) * count > cell * length) & (position * count < (cell + 1) * length)
        weight = inside.float()
        return weight / weight.sum(dim=1, keepdim=True)


class _Same(nn.Module):
    """timm's "same" layers, with padding that ``torch.export`` can carry through many of them.

    TensorFlow pads to ceil(n / stride) positions: the kernel's extent less the stride, and what n
    lacks to a multiple of the stride; the larger half below and right.

    Args:
        layer: a ``Conv2dSame`` or ``AvgPool2dSame``.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, C, h, w) to sizes divided by the stride, rounded up."""
        layer, padding = self.layer, []
        for side in (1, 0):  # F.pad begins with the last dimension
            size, stride = layer.kernel_size[side], layer.stride[side]
            rate = layer.dilation[side] if isinstance(layer, nn.Conv2d) else 1
            amount = rate * (size - 1) + 1 - stride + -maps.shape[2 + side] % stride
            padding += [amount // 2, amount - amount // 2]
        maps = F.pad(maps, padding)
        if isinstance(layer, AvgPool2dSame):
            return F.avg_pool2d(
                maps, layer.kernel_size, layer.stride, count_include_pad=layer.count_include_pad
            )
        return F.conv2d(
            maps, layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups
        )


def _check_request(path: Path) -> None:
    if path.suffix not in PACKAGES:
        raise UserError(
            f"{path}: export writes .onnx, .pt2, .pth, .safetensors, or a folder (a path without "
            f"a suffix); '{path.suffix}' is none of them"
        )
    if path.suffix == ".onnx" and torch.__version__ < ONNX_SINCE:
        raise UserError(
            f"{path}: .onnx needs torch {ONNX_SINCE} or newer, this is {torch.__version__}; "
            "install that, or export .pt2"
        )
    missing = [name for name in PACKAGES[path.suffix] if find_spec(name) is None]
    if missing:
        raise UserError(
            f"{path}: {path.suffix} needs {', '.join(missing)}: pip install {' '.join(missing)}"
        )


def _capture(net: nn.Module) -> torch.export.ExportedProgram:
    net = _with_replaced(net, (Conv2dSame, AvgPool2dSame), _Same)
    shapes = (dict.fromkeys(_AXES, torch.export.Dim.DYNAMIC),)
    return torch.export.export(net, (torch.zeros(_EXAMPLE),), dynamic_shapes=shapes, strict=False)


def _write_pt2(net: nn.Module, path: Path) -> None:
    content = io.BytesIO()  # on a full disk torch's own writer aborts the process
    torch.export.save(_capture(net), content)
    path.write_bytes(content.getbuffer())


def _read_pt2(path: Path) -> Run:
    with path.open("rb") as file:
        return torch.export.load(file).module()


def _write_onnx(net: nn.Module, path: Path) -> None:
    try:
        torch.onnx.export(
            _capture(_with_replaced(net, (nn.AdaptiveAvgPool2d,), _GridMeans.of)),
            f=path,
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=(_AXES,),  # their names; the program has the axes
            external_data=False,  # ONNX allows 2 GB in one file; no network here comes near
        )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: ONNX cannot express this network ({reason}); try .pt2") from error


def _read_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised; no need to print them too
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _with_replaced(
    net: nn.Module, kinds: tuple[type, ...], replace: Callable[[Any], nn.Module]
) -> nn.Module:
    """Copy a network; the copy has other modules in place of those of exactly these types."""
    net = copy.deepcopy(net)
    for name, module in list(net.named_modules()):
        if type(module) in kinds:
            net.set_submodule(name, replace(module))
    return net


@torch.no_grad()
def _largest_difference(net: nn.Module, run: Run, path: Path) -> float:
    generator = torch.Generator().manual_seed(0)
    differences = []
    for shape in _CHECKED:
        images = torch.randn(shape, generator=generator)
        expected = net(images)
        try:
            difference = (run(images) - expected).abs().max().item()
        except Exception as error:  # whatever the runtime raises
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{path}: not written, fails on images {shape}: {reason}") from error
        limit = TOLERANCE * max(1.0, expected.abs().max().item())
        if not difference <= limit:  # also when it is NaN
            raise UserError(
                f"{path}: not written, its logits of images {shape} differ from the network's by "
                f"{difference:.2g}, more than {limit:.2g}"
            )
        differences.append(difference)
    return max(differences)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's talk about its own exporter off the screen."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
