"""Dropout whose noise belongs to the sample, not to the batch that it happens to be in."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_DRAWS = 1 << 15  # what an int16 is drawn from; a probability is rounded to a share of it


class Dropout(nn.Dropout):
    """``nn.Dropout``, drawn by sample once ``seed_dropout`` has said from which seeds."""

    generators: Sequence[torch.Generator] = ()

    def forward(self, maps: Tensor) -> Tensor:
        """Drop values of (B, C, h, w) maps in training mode, and scale the rest up."""
        if not self.training or not self.generators or torch.compiler.is_compiling():
            return super().forward(maps)
        return maps * _noise(torch.empty_like(maps, dtype=torch.int16), maps, self)


class Dropout2d(nn.Dropout2d):
    """``nn.Dropout2d``, drawn by sample once ``seed_dropout`` has said from which seeds."""

    generators: Sequence[torch.Generator] = ()

    def forward(self, maps: Tensor) -> Tensor:
        """Drop channels of (B, C, h, w) maps in training mode, and scale the rest up."""
        if not self.training or not self.generators or torch.compiler.is_compiling():
            return super().forward(maps)
        draws = torch.empty(*maps.shape[:2], 1, 1, dtype=torch.int16, device=maps.device)
        return maps * _noise(draws, maps, self)


def seed_dropout(net: nn.Module, seeds: Sequence[int]) -> None:
    """Begin the random numbers of a training step.

    Image i of the batches that follow draws from generator ``i % len(seeds)``, each where the one
    before has left it: a batch may hold several images of a sample, ``torch.cat([images,
    queries])``, and pass several layers. Its noise is the same whatever else the batch holds.

    Args:
        net: its ``Dropout`` and ``Dropout2d`` take the seeds.
        seeds: one a sample.
    """
    device = next(net.parameters()).device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    for module in net.modules():
        if isinstance(module, Dropout | Dropout2d):
            module.generators = generators
    torch.manual_seed(seeds[0])  # for what draws by batch: a compiled network


def _noise(draws: Tensor, maps: Tensor, layer: Dropout | Dropout2d) -> Tensor:
    """Fill int16 draws by sample; return 0 where they drop, else what keeps the mean as it is."""
    for index, own in enumerate(draws):
        own.random_(generator=layer.generators[index % len(layer.generators)])
    kept = round((1.0 - layer.p) * _DRAWS)
    return (draws <= kept - 1).to(maps.dtype).mul_(_DRAWS / max(1, kept))
