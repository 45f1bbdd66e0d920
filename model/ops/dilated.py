"""Dilated convolution as a sum over windows: on a CPU, kernels also compute the padding's part."""

from collections.abc import Iterator
from itertools import product
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
    """One of the nine weights and the windows that it joins, as indices of the last two axes."""

    place: tuple[Any, ...]  # in the kernel
    read: tuple[Any, ...]  # of the input, ...
    written: tuple[Any, ...]  # ... and of the output


def _taps(size: torch.Size, rate: int) -> Iterator[_Tap]:
    """Yield the taps that meet a map of (h, w) at all."""
    for row, column in product(*(_line_taps(length, rate) for length in size)):
        yield _Tap(*((..., down, right) for down, right in zip(row, column, strict=True)))


def _line_taps(length: int, rate: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield place, what is read and what is written of the taps that meet a line."""
    for tap, shift in enumerate((-rate, 0, rate)):
        first, last = max(0, -shift), min(length, length - shift)
        if first < last:
            yield slice(tap, tap + 1), slice(first + shift, last + shift), slice(first, last)


class _ByWindows(torch.autograd.Function):
    """The convolution tap by tap; the dilated kernel is fast at the gradient of the maps."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, rate: int) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.rate = rate
        # Channels-last, as the products are; in float32 at least.
        total = maps.new_zeros(
            (len(maps), *maps.shape[-2:], len(weight)),
            dtype=torch.promote_types(maps.dtype, torch.float32),
        ).permute(0, 3, 1, 2)
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
            of_tap = _pixels(gradient[tap.written]).T @ _pixels(maps[tap.read])
            of_weight[tap.place] = of_tap[..., None, None]
        return of_maps, of_weight, None


def _pixels(maps: Tensor) -> Tensor:
    """Reshape (B, C, h, w) to (B * h * w, C)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)
