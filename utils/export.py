"""Networks as files that run without this project: ONNX, or torch's own .pt2."""

import copy
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.files import write_atomically

PACKAGES = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".pt2": ()}  # beyond requirements.txt
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
        UserError: another suffix, a missing package, a network that ONNX cannot express, or a
            file that disagrees with the network, which is then not kept.
    """
    if path.suffix not in PACKAGES:
        raise UserError(
            f"{path}: export writes {' or '.join(PACKAGES)}; '{path.suffix}' is neither"
        )
    missing = " ".join(name for name in PACKAGES[path.suffix] if find_spec(name) is None)
    if missing:
        raise UserError(f"{path}: {path.suffix} needs packages: pip install {missing}")
    plain = _Logits(copy.deepcopy(net)).to("cpu", torch.float32).eval()
    plain.to(memory_format=torch.contiguous_format).requires_grad_(False)
    write, read = (_write_onnx, _read_onnx) if path.suffix == ".onnx" else (_write_pt2, _read_pt2)
    with _quiet(), TemporaryDirectory() as folder:
        file = Path(folder) / path.name
        write(plain, file)
        difference = _largest_difference(plain, read(file), path)
        write_atomically(path, lambda partial: shutil.copy(file, partial))
    return difference


class _Logits(nn.Module):
    """A network without its features."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).logits


class _GridMeans(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as two matrix products, which ONNX has for free sizes too."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns

    def forward(self, maps: Tensor) -> Tensor:
        """Average (B, C, h, w) to (B, C, rows, columns)."""
        height, width = maps.shape[-2:]
        return _cells(self.rows, height) @ maps @ _cells(self.columns, width).T


def _cells(count: int, length: int) -> Tensor:
    """(count, length): the weight of each position in the mean of each cell.

    Cell i covers the positions from floor(i length / count) to ceil((i + 1) length / count).
    """
    cell, position = torch.arange(count).unsqueeze(1), torch.arange(length)
    inside = ((position + 1) * count > cell * length) & (position * count < (cell + 1) * length)
    return inside / inside.sum(dim=1, keepdim=True)


def _capture(net: nn.Module) -> torch.export.ExportedProgram:
    shapes = (dict.fromkeys(_AXES, torch.export.Dim.DYNAMIC),)
    return torch.export.export(net, (torch.zeros(_EXAMPLE),), dynamic_shapes=shapes, strict=False)


def _write_pt2(net: nn.Module, path: Path) -> None:
    torch.export.save(_capture(net), path)


def _read_pt2(path: Path) -> Run:
    return torch.export.load(path).module()


def _write_onnx(net: nn.Module, path: Path) -> None:
    try:
        torch.onnx.export(
            _capture(_without_adaptive_pooling(net)),
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
        raise UserError(
            f"{path.name}: ONNX cannot express this network ({reason}); try .pt2"
        ) from error


def _read_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised; no need to print them too
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _without_adaptive_pooling(net: nn.Module) -> nn.Module:
    """Copy a network, with ``_GridMeans`` for its grids of means."""
    net = copy.deepcopy(net)
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d) and child.output_size != 1:
                size = child.output_size
                rows, columns = (size, size) if isinstance(size, int) else size
                module.add_module(name, _GridMeans(rows, columns))
    return net


@torch.no_grad()
def _largest_difference(net: nn.Module, run: Run, path: Path) -> float:
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
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
        largest = max(largest, difference)
    return largest


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings and logs of torch's exporter."""
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)
