"""ResNet backbones: torchvision's own networks with late strides turned into dilation."""

from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

BLOCKS: dict[str, tuple[type[nn.Module], list[int]]] = {
    "resnet18": (torchvision_resnet.BasicBlock, [2, 2, 2, 2]),
    "resnet34": (torchvision_resnet.BasicBlock, [3, 4, 6, 3]),
    "resnet50": (torchvision_resnet.Bottleneck, [3, 4, 6, 3]),
    "resnet101": (torchvision_resnet.Bottleneck, [3, 4, 23, 3]),
    "resnet152": (torchvision_resnet.Bottleneck, [3, 8, 36, 3]),
}


class ResNet(torchvision_resnet.ResNet):
    """A ResNet without its classifier, whose state-dict keys are torchvision's.

    Args:
        name: a key of ``BLOCKS``.
        output_stride: 8, 16 or 32, input size over size of the last map. Below 32 the strides of
            the last layers become dilation, as in torchvision's ``replace_stride_with_dilation``,
            which knows bottleneck blocks only; this does basic blocks too.
        deep_stem: three 3 x 3 convolutions (64, 64, 128) for the one of 7 x 7, as in UniMatch.

    Attributes:
        channels: channels of the stride-4 map and of the last one.

    Source: He et al., CVPR 2016 (torchvision's V1 weights load as they are); dilation as in
    Chen et al., ECCV 2018; deep stem after He et al., CVPR 2019.
    """

    def __init__(self, name: str, output_stride: int, deep_stem: bool = False) -> None:
        block, depths = BLOCKS[name]
        super().__init__(block, depths)
        if deep_stem:
            self.conv1 = nn.Sequential(
                *_conv_bn_relu(3, 64, stride=2), *_conv_bn_relu(64, 64), _conv3x3(64, 128)
            )
            self.bn1 = nn.BatchNorm2d(128)
            self.inplanes = 128
            self.layer1 = self._make_layer(block, 64, depths[0])
        del self.fc, self.avgpool
        dilation = 1
        for layer, stride in ((self.layer3, 16), (self.layer4, 32)):
            if stride > output_stride:
                _turn_stride_into_dilation(layer, dilation)
                dilation *= 2
        self.channels = (64 * block.expansion, 512 * block.expansion)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maps after layer1 (stride 4) and layer4 (the output stride)."""
        stem = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        low_level = self.layer1(stem)
        return low_level, self.layer4(self.layer3(self.layer2(low_level)))


def _conv3x3(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)


def _conv_bn_relu(in_channels: int, channels: int, stride: int = 1) -> nn.Sequential:
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(_conv3x3(in_channels, channels, stride), nn.BatchNorm2d(channels), relu)


def _turn_stride_into_dilation(layer: nn.Sequential, dilation: int) -> None:
    """Undo the layer's stride: the strided convolution keeps its rate, all later ones double it."""
    for conv in layer.modules():
        if isinstance(conv, nn.Conv2d):
            if conv.kernel_size == (3, 3):
                rate = dilation if conv.stride == (2, 2) else 2 * dilation
                conv.dilation = conv.padding = (rate, rate)
            conv.stride = (1, 1)
