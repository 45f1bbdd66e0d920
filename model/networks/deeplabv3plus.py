"""DeepLabv3+ (Chen et al., ECCV 2018), with the state-dict keys of ST++, CISC-R and UniMatch."""

import torch
from torch import Tensor, nn

from model.ops.bilinear import resize
from model.ops.layers import SegmentationNetwork, SpatialMean, conv_bn_relu


class DeepLabV3Plus(SegmentationNetwork):
    """Atrous spatial pyramid on the last map, a decoder at stride 4, a 1 x 1 classifier.

    Args:
        backbone: returns a stride-4 map and a last map, and tells their ``channels``.
        num_classes: C.
        output_stride: 8, 16 or 32; the pyramid's rates are 96 / output_stride times 1, 2, 3.
        channels: D, of the pyramid's and the decoder's maps; checkpoints of the peers have 256.
    """

    def __init__(
        self, backbone: nn.Module, num_classes: int, output_stride: int, channels: int = 256
    ) -> None:
        super().__init__()
        low_channels, last_channels = backbone.channels
        rate = 96 // output_stride
        self.backbone = backbone
        self.head = AtrousSpatialPyramid(last_channels, channels, (rate, 2 * rate, 3 * rate))
        self.reduce = conv_bn_relu(low_channels, 48, 1)
        self.fuse = nn.Sequential(
            *conv_bn_relu(48 + channels, channels, 3),
            *conv_bn_relu(channels, channels, 3),
            nn.Dropout(0.1),
        )
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def extract(self, images: Tensor) -> Tensor:
        """Return the features alone, for callers that need no logits."""
        low_level, last = self.backbone(images)
        pyramid = resize(self.head(last), low_level.shape[-2:], align_corners=True)
        return self.fuse(torch.cat([self.reduce(low_level), pyramid], dim=1))


class AtrousSpatialPyramid(nn.Module):
    """A 1 x 1 and three dilated 3 x 3 convolutions and the image mean, projected to one map."""

    def __init__(self, in_channels: int, channels: int, rates: tuple[int, int, int]) -> None:
        super().__init__()
        self.b0 = conv_bn_relu(in_channels, channels, 1)
        self.b1, self.b2, self.b3 = (conv_bn_relu(in_channels, channels, 3, rate) for rate in rates)
        self.b4 = ImageMean(in_channels, channels)
        self.project = nn.Sequential(*conv_bn_relu(5 * channels, channels, 1), nn.Dropout2d(0.5))

    def forward(self, last: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to (B, channels, h, w)."""
        branches = (self.b0, self.b1, self.b2, self.b3, self.b4)
        return self.project(torch.cat([branch(last) for branch in branches], dim=1))


class ImageMean(nn.Module):
    """The pyramid's global branch: the mean over the image, spread over the map again."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.gap = nn.Sequential(SpatialMean(), *conv_bn_relu(in_channels, channels, 1))

    def forward(self, last: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to (B, channels, h, w), constant over h and w."""
        return self.gap(last).expand(-1, -1, *last.shape[-2:])
