"""DeepLabv2 (Chen et al., TPAMI 2018), as ST++ offers it."""

from torch import Tensor, nn

from model.ops.dilated import DilatedConv2d
from model.ops.layers import SegmentationNetwork


class DeepLabV2(SegmentationNetwork):
    """Four dilated 3 x 3 classifiers on the last map, summed.

    Args:
        backbone: returns a stride-4 map and a last map, and tells their ``channels``.
        num_classes: C.
        output_stride: the backbone's; the rates do not depend on it.
    """

    RATES = (6, 12, 18, 24)

    def __init__(self, backbone: nn.Module, num_classes: int, output_stride: int) -> None:
        super().__init__()
        _, channels = backbone.channels
        self.backbone = backbone
        self.classifier = nn.ModuleList(
            DilatedConv2d(channels, num_classes, rate, bias=True) for rate in self.RATES
        )

    def extract(self, images: Tensor) -> Tensor:
        """Return the features alone, at the output stride."""
        return self.backbone(images)[1]

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits of features, at the features' size."""
        return sum(branch(features) for branch in self.classifier)
