"""DPT: a convolutional decoder on four layers of a plain vision transformer."""

from torch import Tensor, nn

from model.ops.bilinear import resize
from model.ops.layers import SegmentationNetwork, conv_bn_relu, cut


class DPT(SegmentationNetwork):
    """Tokens reassembled into maps at strides 4 to 32, fused from coarse to fine, classified.

    Sizes are for a patch of 16 pixels. Other patches change the strides in proportion: with 14
    the features have a stride of 3.5.

    Args:
        backbone: returns four maps of one size, and tells their ``channels`` and ``patch_size``.
        num_classes: C.
        output_stride: not used: the patch decides.
        channels: of the decoder's maps; None: 128 for encoders of up to 384 channels, else 256.

    Source: Ranftl et al., ICCV 2021, with two departures: the class token is left out
    ("ignore" among the paper's readouts), and the last fusion stays at stride 4.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        output_stride: int,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        channels = channels or (128 if backbone.channels <= 384 else 256)
        self.backbone = backbone
        self.reassemble = nn.ModuleList(
            nn.Sequential(nn.Conv2d(backbone.channels, channels, 1), resample)
            for resample in (
                nn.ConvTranspose2d(channels, channels, 4, stride=4),
                nn.ConvTranspose2d(channels, channels, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            )
        )
        self.fusion = nn.ModuleList(Fusion(channels, first=stage == 3) for stage in range(4))
        self.fuse = nn.Sequential(*conv_bn_relu(channels, channels, 3), nn.Dropout(0.1))
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def extract(self, images: Tensor) -> Tensor:
        """Return the features alone, without what covers only padding of the images."""
        fused = None
        stages = zip(self.backbone(images), self.reassemble, self.fusion, strict=True)
        for tokens, reassemble, fuse in reversed(list(stages)):
            fused = fuse(reassemble(tokens), fused)
        patch = self.backbone.patch_size
        height, width = ((4 * length + patch - 1) // patch for length in images.shape[-2:])
        return self.fuse(cut(fused, height, width))


class Fusion(nn.Module):
    """Add the coarser fused map to a reassembled one, and refine the sum.

    Args:
        channels: of all maps.
        first: whether this is the coarsest stage, which has nothing to add.
    """

    def __init__(self, channels: int, first: bool) -> None:
        super().__init__()
        self.skip = nn.Identity() if first else ResidualUnit(channels)
        self.refine = ResidualUnit(channels)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, skip: Tensor, coarser: Tensor | None) -> Tensor:
        """Map (B, channels, h, w), and a coarser map of any size, to (B, channels, h, w)."""
        fused = self.skip(skip)
        if coarser is not None:
            fused = fused + resize(coarser, skip.shape[-2:], align_corners=True)
        return self.project(self.refine(fused))


class ResidualUnit(nn.Module):
    """Two 3 x 3 convolutions, each after a ReLU and before a batch norm, and a way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, channels, h, w) to the same shape."""
        return maps + self.layers(maps)
