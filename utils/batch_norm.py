"""Batch norm over the batch of all processes."""

import torch
from torch import Tensor, nn

from utils.distributed import total, world


def synchronised(net: nn.Module) -> nn.Module:
    """Let batch norm see the whole batch, however many processes share it.

    Args:
        net: on its device. Its state-dict keys stay; in one process so does the network.

    Returns:
        The network to use: torch's synchronised batch norm, which knows only accelerators; on a
        CPU this module's.
    """
    if world() == 1:
        return net
    if next(net.parameters()).device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm2d  # the same parameters, buffers and settings
    return net


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` whose statistics in training mode are those of all processes' images."""

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise (B, C, h, w) maps; B may differ between processes."""
        if not self.training:
            return super().forward(maps)
        values = maps.to(torch.promote_types(maps.dtype, torch.float32))
        count = values.new_tensor([values.numel() / values.shape[1]])
        sums = total(torch.cat([values.sum(dim=(0, 2, 3)), count]))
        count = sums[-1].detach()
        mean = sums[:-1] / count
        # Two passes: a mean of squares less a squared mean would lose digits.
        centred = values - mean[:, None, None]
        variance = total(centred.square().sum(dim=(0, 2, 3))) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(maps.dtype)

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)
