"""The networks, the losses and the mathematics of CISC-R."""

from pathlib import Path

from torch import nn

from model import resnet
from model.deeplabv3plus import DeepLabV3Plus
from model.layers import SegmentationOutput
from utils.checkpoint import load_weights
from utils.errors import UserError

__all__ = ["BACKBONES", "NETWORKS", "SegmentationOutput", "build_model"]

PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"
NETWORKS = {"deeplabv3plus": DeepLabV3Plus}
BACKBONES = tuple(resnet.BLOCKS)


def build_model(
    name: str,
    backbone: str,
    num_classes: int,
    output_stride: int = 8,
    pretrained: str | Path | None = None,
) -> nn.Module:
    """Build a network; ``net(images)`` gives ``SegmentationOutput(logits, features)``.

    Args:
        name: a key of ``NETWORKS``.
        backbone: one of ``BACKBONES``.
        num_classes: C, the number of logits a pixel gets.
        output_stride: 8, 16 or 32, input size over size of the backbone's last map.
        pretrained: file of backbone weights; 'auto' for ``pretrained/<backbone>.pth`` of this
            project; None starts from random numbers (torch's generator).

    Raises:
        UserError: an unknown name, or a weights file that is missing or does not fit.
    """
    for key, value, known in (("name", name, NETWORKS), ("backbone", backbone, BACKBONES)):
        if value not in known:
            raise UserError(f"model.{key}: '{value}' is not one of {', '.join(known)}")
    if output_stride not in (8, 16, 32):
        raise UserError(f"model.output_stride: {output_stride} is not one of 8, 16, 32")
    trunk = resnet.ResNet(backbone, output_stride)
    if pretrained is not None:
        load_weights(trunk, _weights_file(backbone, pretrained))
    return NETWORKS[name](trunk, num_classes, output_stride)


def _weights_file(backbone: str, pretrained: str | Path) -> Path:
    path = PRETRAINED / f"{backbone}.pth" if pretrained == "auto" else Path(pretrained)
    if not path.is_file():
        raise UserError(
            f"{path}: no weights for {backbone}; put torchvision's file there (its address is in "
            "pretrained/README.md), or set model.pretrained=null to start from random numbers"
        )
    return path
