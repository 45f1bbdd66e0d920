"""What the networks share."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.ops.bilinear import resize
from model.ops.dilated import DilatedConv2d


class SegmentationOutput(NamedTuple):
    """What every network of this project returns.

    Attributes:
        logits: (B, C, H, W) float32 (float64 stays) at the size of the input images.
        features: (B, D, h, w) float, the last map before the classifier.
    """

    logits: Tensor
    features: Tensor


class SegmentationNetwork(nn.Module):
    """What the networks share: ``extract`` gives features, ``classifier`` their logits."""

    def forward(
        self, images: Tensor, perturbed: int = 0, dropout: float = 0.5
    ) -> SegmentationOutput:
        """Segment images.

        Args:
            images: (B, 3, H, W) float, normalised, of any H and W.
            perturbed: so many of the last images lose channels of their features ...
            dropout: ... each channel with this probability. Source: feature perturbation
                (UniMatch, Yang et al., CVPR 2023). Deviates: the last features, not the encoder's.
        """
        features = self.extract(images)
        if perturbed:
            dropped = F.dropout2d(features[-perturbed:], dropout)
            features = torch.cat([features[:-perturbed], dropped])
        return SegmentationOutput(full_size(self.classify(features), images), features)

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits of features, at the features' size."""
        return self.classifier(features)


class SpatialMean(nn.AdaptiveAvgPool2d):
    """The mean over height and width: (B, C, h, w) to (B, C, 1, 1).

    Torch's own gradient of it is never channels-last: added to others that are, it makes them, and
    all that they flow back into, several times slower.
    """

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, maps: Tensor) -> Tensor:
        """Average, channels last."""
        return maps.permute(0, 2, 3, 1).mean(dim=(1, 2))[:, :, None, None]


def conv_bn_relu(in_channels: int, channels: int, size: int, rate: int = 1) -> nn.Sequential:
    """Build a convolution that keeps height and width, 3 x 3 if dilated; batch norm; ReLU."""
    conv = (
        nn.Conv2d(in_channels, channels, size, padding=size // 2, bias=False)
        if rate == 1
        else DilatedConv2d(in_channels, channels, rate)
    )
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))


def cut(maps: Tensor, height: int, width: int) -> Tensor:
    """Return the upper left part of (..., H, W) maps, which may be all of them."""
    if torch.compiler.is_compiling():  # a slice's strides would tell whether it is all
        rows, columns = (torch.arange(n, device=maps.device) for n in (height, width))
        return maps.index_select(-2, rows).index_select(-1, columns)
    return maps[..., :height, :width]


def full_size(logits: Tensor, images: Tensor) -> Tensor:
    """Resize logits to the images' size, in float32: cast while small, not once more when large."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return resize(logits, images.shape[-2:], align_corners=True)
