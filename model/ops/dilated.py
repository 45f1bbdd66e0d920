"""Dilated convolution as products of windows: what large rates cost where kernels skip nothing."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DilatedConv2d(nn.Conv2d):
    """A 3 x 3 convolution of stride 1 that keeps height and width, at any rate.

    At a pyramid's rates most taps read padding: at rate 36 on a 41 x 41 map a corner tap meets
    5 x 5 pixels of it. On a CPU each tap is a 1 x 1 convolution of the window that it does meet,
    added in float32: fewer products, and in bf16 a kernel ten times as fast as the dilated one (see
    ``tests/benchmarks/step.py``). Elsewhere, and in exported graphs, it is ``nn.Conv2d``.

    Args:
        in_channels, channels: of the maps.
        rate: pixels from tap to tap.
        bias: add a bias a channel.
    """

    def __init__(self, in_channels: int, channels: int, rate: int, bias: bool = False) -> None:
        super().__init__(in_channels, channels, 3, padding=rate, dilation=rate, bias=bias)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to (B, channels, h, w)."""
        if maps.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(maps)
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            maps, weight = maps.to(dtype), weight.to(dtype)
        out = _ByWindows.apply(maps, weight, self.dilation[0])
        return out if self.bias is None else out + self.bias.to(out.dtype)[:, None, None]


class _Tap(NamedTuple):
    """One of nine weights: where it stands in the kernel, and which pixels it joins."""

    place: tuple[slice, ...]  # in the kernel's last two dimensions
    read: tuple[slice, ...]  # of the input, ...
    written: tuple[slice, ...]  # ... and of the output


def _taps(size: torch.Size, rate: int) -> Iterator[_Tap]:
    """Yield the taps that meet a map of (h, w) at all."""
    lines = []
    for length in size:
        shifts = [(tap, (tap - 1) * rate) for tap in range(3)]
        lines.append([(tap, shift) for tap, shift in shifts if abs(shift) < length])
    for row, down in lines[0]:
        for column, right in lines[1]:
            place = (slice(row, row + 1), slice(column, column + 1))
            pairs = [_overlap(n, by) for n, by in zip(size, (down, right), strict=True)]
            read, written = zip(*pairs, strict=True)
            yield _Tap(*((..., *part) for part in (place, read, written)))


def _overlap(length: int, shift: int) -> tuple[slice, slice]:
    """Return what of a line is read, and where it is written, by a tap ``shift`` pixels away."""
    first, last = max(0, -shift), min(length, length - shift)
    return slice(first + shift, last + shift), slice(first, last)


class _ByWindows(torch.autograd.Function):
    """The convolution tap by tap.

    The gradient of the maps is left to the dilated kernel, which is fast that way round.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, rate: int) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.rate = rate
        total = _zeros_like(maps, len(weight))
        for tap in _taps(maps.shape[-2:], rate):
            total[tap.written] += F.conv2d(maps[tap.read], weight[tap.place])
        return total.to(maps.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        maps, weight = ctx.saved_tensors
        rate = (ctx.rate, ctx.rate)
        geometry = (None, (1, 1), rate, rate, False, (0, 0), 1)
        of_maps, _, _ = torch.ops.aten.convolution_backward(
            gradient, maps, weight, *geometry, (True, False, False)
        )
        of_weight = torch.zeros_like(weight)
        for tap in _taps(maps.shape[-2:], ctx.rate):
            product = _pixels(gradient[tap.written]).T @ _pixels(maps[tap.read])
            of_weight[tap.place] = product[..., None, None]
        return of_maps, of_weight, None


def _pixels(maps: Tensor) -> Tensor:
    """(B, C, h, w) to (B * h * w, C), no copy if all of a channels-last map is meant."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def _zeros_like(maps: Tensor, channels: int) -> Tensor:
    """Return a channels-last sum of ``maps``' size to add products to, float32 at least."""
    shape = (len(maps), channels, *maps.shape[-2:])
    dtype = torch.promote_types(maps.dtype, torch.float32)
    return torch.zeros(shape, dtype=dtype).to(memory_format=torch.channels_last)
