"""The networks, the losses and the mathematics of CISC-R."""

from pathlib import Path

from torch import nn

from model.networks.deeplabv2 import DeepLabV2
from model.networks.deeplabv3plus import DeepLabV3Plus
from model.networks.pspnet import PSPNet
from model.networks.resnet import BLOCKS, ResNet
from model.networks.xception import Xception65
from model.ops.layers import SegmentationOutput
from utils import IMAGENET
from utils.checkpoint import load_weights
from utils.config.schema import ModelSection
from utils.errors import UserError

__all__ = ["BACKBONES", "NETWORKS", "STEMS", "SegmentationOutput", "build_model"]

PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"
NETWORKS = {"deeplabv3plus": DeepLabV3Plus, "pspnet": PSPNet, "deeplabv2": DeepLabV2}
BACKBONES = (*BLOCKS, "xception65")
STEMS = ("plain", "deep")


def build_model(
    name: str,
    backbone: str,
    num_classes: int,
    output_stride: int = 8,
    pretrained: str | Path | None = None,
    stem: str = "plain",
) -> nn.Module:
    """Build a network; ``net(images)`` gives ``SegmentationOutput(logits, features)``.

    Args:
        name: a key of ``NETWORKS``.
        backbone: one of ``BACKBONES``.
        num_classes: C, the number of logits a pixel gets.
        output_stride: 8, 16 or 32 (xception65: 8 or 16), input size over size of the last map.
        pretrained: file of backbone weights; 'auto' for ``pretrained/<backbone>.pth`` of this
            project (``<backbone>_deep.pth`` with the deep stem); None starts from random numbers
            (torch's generator).
        stem: 'plain', torchvision's; or 'deep', UniMatch's, for ResNets.

    Raises:
        UserError: an unknown name, or a weights file that is missing or does not fit.
    """
    _refuse_unknown("name", name, tuple(NETWORKS))
    _refuse_unknown("backbone", backbone, BACKBONES)
    _refuse_unknown("stem", stem, STEMS if backbone in BLOCKS else STEMS[:1])
    _refuse_unknown("output_stride", output_stride, (8, 16, 32) if backbone in BLOCKS else (8, 16))
    if backbone in BLOCKS:
        trunk: nn.Module = ResNet(backbone, output_stride, deep_stem=stem == "deep")
    else:
        trunk = Xception65(output_stride)
    if pretrained is not None:
        weights = backbone if stem == "plain" else f"{backbone}_{stem}"
        load_weights(trunk, _weights_file(weights, pretrained))
    net = NETWORKS[name](trunk, num_classes, output_stride)
    net.preprocessing = IMAGENET
    return net


def _refuse_unknown(key: str, value: str | int, known: tuple[str | int, ...]) -> None:
    if value not in known:
        choice = ", ".join(map(str, known))
        raise UserError(f"model.{key}: '{value}' is not one of {choice}")


def _weights_file(weights: str, pretrained: str | Path) -> Path:
    path = PRETRAINED / f"{weights}.pth" if pretrained == "auto" else Path(pretrained)
    if not path.is_file():
        raise UserError(
            f"{path}: no weights for {weights}; run 'python -m dataset.prepare weights {weights}' "
            "(pretrained/README.md has the addresses), or set model.pretrained=null to start from "
            "random numbers"
        )
    return path


def network_of(
    settings: ModelSection, num_classes: int, pretrained: str | Path | None
) -> nn.Module:
    """Build the network that a config describes; ``pretrained`` as in ``build_model``."""
    return build_model(
        settings.name,
        settings.backbone,
        num_classes,
        settings.output_stride,
        pretrained,
        settings.stem,
    )
