"""PSPNet (Zhao et al., CVPR 2017), as ST++ offers it."""

import torch
from torch import Tensor, nn

from model.ops.bilinear import resize
from model.ops.layers import SegmentationNetwork, SpatialMean, conv_bn_relu


class PSPNet(SegmentationNetwork):
    """The last map beside its means over grids of 1, 2, 3 and 6 cells, fused and classified.

    Args:
        backbone: returns a stride-4 map and a last map, and tells their ``channels``.
        num_classes: C.
        output_stride: the backbone's; the pyramid does not depend on it.
    """

    GRIDS = (1, 2, 3, 6)

    def __init__(self, backbone: nn.Module, num_classes: int, output_stride: int) -> None:
        super().__init__()
        _, channels = backbone.channels
        self.backbone = backbone
        self.pyramid = nn.ModuleList(
            nn.Sequential(_grid_of_means(grid), *conv_bn_relu(channels, channels // 4, 1))
            for grid in self.GRIDS
        )
        self.fuse = nn.Sequential(*conv_bn_relu(2 * channels, channels // 4, 3), nn.Dropout(0.1))
        self.classifier = nn.Conv2d(channels // 4, num_classes, 1)

    def extract(self, images: Tensor) -> Tensor:
        """Return the features alone, at the output stride."""
        _, last = self.backbone(images)
        means = [resize(level(last), last.shape[-2:], align_corners=True) for level in self.pyramid]
        return self.fuse(torch.cat([last, *means], dim=1))


def _grid_of_means(cells: int) -> nn.Module:
    return SpatialMean() if cells == 1 else nn.AdaptiveAvgPool2d(cells)
