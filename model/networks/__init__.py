"""The networks: encoders, decoders, and what builds one from a config."""

from pathlib import Path

from torch import nn

from dataset.catalog import dataset_info
from model.networks.deeplabv2 import DeepLabV2
from model.networks.deeplabv3plus import DeepLabV3Plus
from model.networks.dpt import DPT
from model.networks.pspnet import PSPNet
from model.networks.resnet import BLOCKS, ResNet
from model.networks.timm_encoders import (
    TimmEncoder,
    TimmTransformer,
    preprocessing_of,
    undilated_stride,
)
from model.networks.weights import find_weights, read_weights
from model.networks.xception import Xception65
from model.ops.frozen import freeze
from utils.checkpoint import is_smp, load_weights, put_weights
from utils.config.schema import Config, ModelSection
from utils.device import Device
from utils.errors import UserError

NETWORKS = {
    "deeplabv3plus": DeepLabV3Plus,
    "pspnet": PSPNet,
    "deeplabv2": DeepLabV2,
    "dpt": DPT,
}
BACKBONES = (*BLOCKS, "xception65")  # and timm/<name>
STEMS = ("plain", "deep")


def build_model(
    name: str,
    backbone: str,
    num_classes: int,
    output_stride: int = 8,
    pretrained: str | Path | None = None,
    stem: str = "plain",
    channels: int | None = None,
) -> nn.Module:
    """Build a network; ``net(images)`` gives ``SegmentationOutput(logits, features)``.

    Beside its layers the network has ``net.preprocessing``, how its encoder wants its images, and
    ``net.pretrained_from``, the file that its encoder starts from and what of it was left out, or
    None.

    Args:
        name: a key of ``NETWORKS``.
        backbone: one of ``BACKBONES``, or ``timm/<name>``; ``dpt`` takes a plain vision
            transformer of timm's, the others anything else.
        num_classes: C, the number of logits a pixel gets.
        output_stride: 8, 16 or 32 (xception65: 8 or 16), input size over size of the last map;
            networks of timm's that cannot dilate have one of their own; ``dpt`` ignores it.
        pretrained: file of encoder weights, .pth or .safetensors; 'auto' as in
            ``model.networks.weights.find_weights``; None initialises at random (torch's
            generator).
        stem: 'plain', torchvision's; or 'deep', UniMatch's, for ResNets.
        channels: of the decoder's maps, for deeplabv3plus and dpt; None for their own number.

    Raises:
        UserError: an unknown name, a combination that does not exist, or a weights file that is
            missing or does not fit.
    """
    _choose("name", name, tuple(NETWORKS))
    encoder = _encoder(name, backbone, output_stride, stem)
    file = None if pretrained is None else find_weights(backbone, stem, pretrained)
    source = file and str(file)
    if file:
        left_out = put_weights(encoder, read_weights(file, backbone), file)
        parts = ", ".join(dict.fromkeys(key.partition(".")[0] for key in left_out))
        source += f" without {parts}" if parts else ""
        source += " (model.init takes them too)" if parts and not is_smp(left_out) else ""
    if channels is not None and name not in ("deeplabv3plus", "dpt"):
        raise UserError(f"model.channels: {name} has no such choice; set model.channels=null")
    width = {} if channels is None else {"channels": channels}
    net = NETWORKS[name](encoder, num_classes, output_stride, **width)
    net.preprocessing = preprocessing_of(backbone)
    net.pretrained_from = source
    return net


def largest_stride(backbone: str) -> int:
    """Return the largest output stride that an encoder has; for transformers, the patch's side."""
    if backbone.startswith("timm/"):
        return undilated_stride(backbone)
    return 32 if backbone in BLOCKS else 16


def _encoder(name: str, backbone: str, output_stride: int, stem: str) -> nn.Module:
    resnet = backbone in BLOCKS
    _choose("stem", stem, STEMS if resnet else STEMS[:1])
    if backbone.startswith("timm/"):
        own = backbone.removeprefix("timm/")
        return TimmTransformer(own) if name == "dpt" else TimmEncoder(own, output_stride)
    if name == "dpt":
        raise UserError(
            f"model.backbone: dpt takes a plain vision transformer, not {backbone}; try "
            "timm/vit_small_patch14_dinov2.lvd142m"
        )
    _choose("backbone", backbone, (*BACKBONES, "timm/<name>"))
    _choose("output_stride", output_stride, (8, 16, 32) if resnet else (8, 16))
    return ResNet(backbone, output_stride, stem == "deep") if resnet else Xception65(output_stride)


def _choose(key: str, value: str | int, known: tuple[str | int, ...]) -> None:
    if value not in known:
        choice = ", ".join(map(str, known))
        raise UserError(f"model.{key}: '{value}' is not one of {choice}")


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
        settings.channels,
    )


def load_network(config: Config, file: Path) -> nn.Module:
    """Build the network that a config describes, with a checkpoint's weights."""
    net = network_of(config.model, len(dataset_info(config.dataset).classes), pretrained=None)
    load_weights(net, file)
    return net


def load_frozen(config: Config, device: Device, file: Path) -> nn.Module:
    """Load the network of a checkpoint onto a device, frozen: for inference alone."""
    return freeze(load_network(config, file), device)
