"""Networks that only infer: batch norm folded into convolutions, weights cast once."""

from functools import partial

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model.ops.dilated import DilatedConv2d, DilatedDepthwiseConv2d
from utils.device import Device

# Exactly these types: a subclass may do more, as standardise its weights.
_CONVOLUTIONS = (nn.Conv2d, DilatedDepthwiseConv2d, DilatedConv2d, Conv2dSame)
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d)
_EXAMPLE = (1, 3, 64, 64)
_TOLERANCE = 1e-3  # of the largest logit and feature: rounding is far below, a wrong fold far above


def freeze(net: nn.Module, device: Device) -> nn.Module:
    """Turn a network, in place, into one that only infers: the same function, within rounding.

    It is faster than in eval mode. Autocast casts weights anew in every pass; here they are cast
    for good. Which batch norm is fed by which convolution is seen in a pass of a small image; batch
    norm stays as it is if the folded network answers otherwise than the network.

    Args:
        net: is changed; it cannot be trained or saved afterwards.
        device: where it goes, and in which precision its convolutions are.

    Returns:
        The network, in eval mode, without gradients. Call it under ``device.autocast()``.
    """
    _fold(net.eval().requires_grad_(False))
    if device.dtype != torch.float32:
        for module in net.modules():
            if type(module) in (*_CONVOLUTIONS, nn.Linear):
                module.to(device.dtype)
    return device.place(net)


@torch.inference_mode(False)  # whose tensors have no version
@torch.no_grad()
def _fold(net: nn.Module) -> None:
    like = next(net.parameters())
    images = torch.rand(_EXAMPLE, generator=torch.Generator().manual_seed(0)).to(like)
    expected, pairs = _trace(net, images)
    replaced: dict[str, nn.Module] = {}
    for name, norm_name in pairs:
        conv, norm = net.get_submodule(name), net.get_submodule(norm_name)
        replaced = {name: conv, norm_name: norm} | replaced  # the first of each name
        net.set_submodule(name, fuse_conv_bn_eval(conv, norm))
        # timm's BatchNormAct2d activates too; what it drops in training it keeps in eval mode.
        net.set_submodule(norm_name, getattr(norm, "act", nn.Identity()))
    same = all(
        (one - other).abs().max() <= _TOLERANCE * other.abs().max()
        for one, other in zip(net(images), expected, strict=True)
    )
    if not same:
        for name, module in replaced.items():
            net.set_submodule(name, module)


def _trace(net: nn.Module, images: Tensor) -> tuple[tuple[Tensor, ...], list[tuple[str, str]]]:
    """Return a network's output, and names of convolutions and of the norms that they feed."""
    pairs: dict[tuple[str, str], None] = {}

    def mark(name: str, _: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        output.made_by = (name, output._version)  # the version rises with changes in place

    def look(name: str, _: nn.Module, given: tuple[Tensor]) -> None:
        maker, version = getattr(given[0], "made_by", (None, None))
        if version == given[0]._version:
            pairs[maker, name] = None

    handles = []
    for name, module in net.named_modules():
        if type(module) in _CONVOLUTIONS:
            handles.append(module.register_forward_hook(partial(mark, name)))
        elif type(module) in _NORMS and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(partial(look, name)))
    output = net(images)
    for handle in handles:
        handle.remove()
    return output, list(pairs)
