"""Networks that only infer: batch norm folded into convolutions, weights cast once."""

from copy import deepcopy
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from utils.device import Device

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def frozen(net: nn.Module, device: Device) -> nn.Module:
    """Copy a network for inference: the same function in eval mode, within rounding, but faster.

    Autocast casts frozen weights anew in every pass; here they are cast for good.

    Args:
        net: stays as it is, whatever its mode.
        device: where the copy goes, and in which precision its convolutions are.

    Returns:
        The copy, in eval mode, without gradients. Call it under ``device.autocast()``.
    """
    copy = deepcopy(net).eval().requires_grad_(False)
    for module in copy.modules():
        # Every network here registers a batch norm right after the convolution that feeds it.
        for (name, conv), (norm_name, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, _NORMS):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    if device.dtype != torch.float32:
        for module in copy.modules():
            if isinstance(module, nn.Conv2d):
                module.to(device.dtype)
    return device.place(copy)
