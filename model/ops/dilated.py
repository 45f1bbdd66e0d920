"""Dilated convolutions for CPUs, dense and depthwise: torch's own kernels are slow at them."""

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
        maps, weight = _cast(maps, self.weight)
        return _with_bias(_ByWindows.apply(maps, weight, self.dilation[0]), self.bias)


class DilatedDepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution of stride 1 that keeps height and width, of odd size, at any rate.

    On a CPU torch's gradients of dilated ones take more than ten times as long as the convolution.
    Here that of the maps is a convolution again, and that of each weight a sum over the windows
    that it joins (see ``tests/benchmarks/step.py``). Elsewhere, and in exported graphs, it is
    ``nn.Conv2d``.
    """

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "DilatedDepthwiseConv2d":
        """Take over a convolution's parameters."""
        made = cls(
            *(conv.in_channels, conv.out_channels, conv.kernel_size, 1, conv.padding),
            *(conv.dilation, conv.groups, conv.bias is not None),
            device="meta",  # draws no random numbers
        )
        made.weight, made.bias = conv.weight, conv.bias
        return made

    @staticmethod
    def can_replace(module: nn.Module) -> bool:
        """Tell whether a module is such a convolution, and dilated."""
        if type(module) is not nn.Conv2d:  # a subclass may do more
            return False
        kernel, rate = module.kernel_size[0], module.dilation[0]
        like = nn.Conv2d(
            *(module.in_channels, module.in_channels, kernel, 1, rate * (kernel // 2), rate),
            groups=module.in_channels,
            bias=module.bias is not None,
            device="meta",
        )
        return rate > 1 and kernel % 2 == 1 and like.extra_repr() == module.extra_repr()

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, C, h, w) to the same."""
        plain = maps.device.type != "cpu" or torch.compiler.is_compiling()
        if plain or not torch.is_grad_enabled():
            return super().forward(maps)
        maps, weight = _cast(maps, self.weight)
        return _with_bias(_Depthwise.apply(maps, weight, self.dilation[0]), self.bias)


def _cast(*tensors: Tensor) -> Iterator[Tensor]:
    """Cast as autocast does with what a convolution takes."""
    if torch.is_autocast_enabled("cpu"):
        return (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in tensors)
    return iter(tensors)


def _with_bias(maps: Tensor, bias: Tensor | None) -> Tensor:
    return maps if bias is None else maps + bias.to(maps.dtype)[:, None, None]


class _Tap(NamedTuple):
    """One of the weights and the windows that it joins, as indices of the last two axes."""

    place: tuple[Any, ...]  # in the kernel
    read: tuple[Any, ...]  # of the input, ...
    written: tuple[Any, ...]  # ... and of the output


def _taps(size: torch.Size, kernel: int, rate: int) -> Iterator[_Tap]:
    """Yield the taps that meet a map of (h, w) at all."""
    for row, column in product(*(_line_taps(length, kernel, rate) for length in size)):
        yield _Tap(*((..., down, right) for down, right in zip(row, column, strict=True)))


def _line_taps(length: int, kernel: int, rate: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield place, what is read and what is written of the taps that meet a line."""
    for tap in range(kernel):
        shift = rate * (tap - kernel // 2)
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
        for tap in _taps(maps.shape[-2:], 3, rate):
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
        for tap in _taps(maps.shape[-2:], 3, ctx.rate):
            of_tap = _pixels(gradient[tap.written]).T @ _pixels(maps[tap.read])
            of_weight[tap.place] = of_tap[..., None, None]
        return of_maps, of_weight, None


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution whose gradient of the weights is taken tap by tap."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, rate: int) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.rate = rate
        return _depthwise(maps, weight, rate)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        maps, weight = ctx.saved_tensors
        of_maps = _depthwise(gradient, weight.flip(2, 3), ctx.rate)
        of_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for tap in _taps(maps.shape[-2:], weight.shape[-1], ctx.rate):
            joined = maps[tap.read] * gradient[tap.written]
            of_weight[tap.place] = joined.sum(dim=(0, 2, 3), dtype=of_weight.dtype).view(
                -1, 1, 1, 1
            )
        return of_maps, of_weight.to(weight.dtype), None


def _depthwise(maps: Tensor, weight: Tensor, rate: int) -> Tensor:
    padding = rate * (weight.shape[-1] // 2)
    return F.conv2d(maps, weight, None, 1, padding, rate, len(weight))


def _pixels(maps: Tensor) -> Tensor:
    """Reshape (B, C, h, w) to (B * h * w, C)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)
