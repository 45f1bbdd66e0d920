"""One network of each family, for the tests that every network goes through."""

import torch
from torch import nn

from model import build_model

FAMILIES = {
    "ResNet": ("deeplabv3plus", "resnet18"),
    "Xception": ("deeplabv3plus", "xception65"),
    "EfficientNet": ("deeplabv3plus", "timm/tf_efficientnet_lite0"),
    "ConvNeXt": ("deeplabv3plus", "timm/convnext_atto"),
    "MobileNetV3": ("deeplabv3plus", "timm/mobilenetv3_small_050"),
    "ViT": ("dpt", "timm/vit_tiny_patch16_224"),
}


def family(name: str, num_classes: int = 5) -> nn.Module:
    """Build the network of a family at output stride 16, initialised from one seed."""
    torch.manual_seed(0)
    return build_model(*FAMILIES[name], num_classes, 16)


def with_statistics(net: nn.Module) -> nn.Module:
    """Give every batch norm statistics and weights that fresh ones lack; return the network."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
    with torch.no_grad():
        net.train()(torch.randn(4, 3, 64, 64))
    return net
