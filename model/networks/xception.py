"""Xception-65 as DeepLab uses it on COCO, with the state-dict keys of UniMatch and CorrMatch."""

from torch import Tensor, nn

_MOMENTUM = 3e-4  # of batch norm


class Xception65(nn.Module):
    """Xception-65: entry flow, sixteen middle blocks, exit flow; no classifier.

    Args:
        output_stride: 8 or 16, input size over size of the last map. At 8 the stride of block 3
            is left out, and all later convolutions are dilated by 2.

    Attributes:
        channels: channels of the stride-4 map and of the last one.

    Source: Chollet, CVPR 2017; modified as in Chen et al., ECCV 2018; docs/method.md, section 12.
    """

    def __init__(self, output_stride: int) -> None:
        super().__init__()
        rate = 16 // output_stride
        self.conv1 = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32, momentum=_MOMENTUM)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64, momentum=_MOMENTUM)
        self.relu = nn.ReLU(inplace=True)
        self.block1 = Block((64, 128, 128, 128), stride=2)
        self.block2 = Block((128, 256, 256, 256), stride=2)
        self.block3 = Block((256, 728, 728, 728), stride=2 if output_stride == 16 else 1)
        for number in range(4, 20):
            self.add_module(f"block{number}", Block((728, 728, 728, 728), rate=rate))
        self.block20 = Block((728, 728, 1024, 1024), rate=rate)
        self.conv3 = SeparableConv(1024, 1536, rate=rate)
        self.conv4 = SeparableConv(1536, 1536, rate=rate)
        self.conv5 = SeparableConv(1536, 2048, rate=rate)
        self.channels = (256, 2048)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return block 2's map before its stride (stride 4) and the last map."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.relu(self.bn2(self.conv2(x)))
        x, _ = self.block1(x)
        x, low_level = self.block2(x)
        for number in range(3, 21):
            x, _ = self.get_submodule(f"block{number}")(x)
        for conv in (self.conv3, self.conv4, self.conv5):
            x = conv.activate(x)
        return low_level, x


class Block(nn.Module):
    """Three separable convolutions, each after a ReLU, and a way around them.

    Args:
        channels: of the input and after each convolution.
        stride: of the third.
        rate: dilation of all three.
    """

    def __init__(self, channels: tuple[int, int, int, int], stride: int = 1, rate: int = 1) -> None:
        super().__init__()
        first, second, third, last = channels
        self.sepconv1 = SeparableConv(first, second, rate=rate)
        self.sepconv2 = SeparableConv(second, third, rate=rate)
        self.sepconv3 = SeparableConv(third, last, stride, rate)
        self.relu = nn.ReLU()
        if stride != 1 or first != last:
            self.skip = nn.Conv2d(first, last, 1, stride, bias=False)
            self.skipbn = nn.BatchNorm2d(last, momentum=_MOMENTUM)
        else:
            self.skip, self.skipbn = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the block's output and its second convolution's, which has no stride yet."""
        second = self.sepconv2(self.relu(self.sepconv1(self.relu(x))))
        return self.sepconv3(self.relu(second)) + self.skipbn(self.skip(x)), second


class SeparableConv(nn.Module):
    """A 3 x 3 convolution of each channel, then a 1 x 1 across them, batch norm after both."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1, rate: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, 3, stride, rate, rate, groups=in_channels, bias=False
        )
        self.bn1 = nn.BatchNorm2d(in_channels, momentum=_MOMENTUM)
        self.pointwise = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels, momentum=_MOMENTUM)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve without a ReLU: inside blocks it comes before."""
        return self.bn2(self.pointwise(self.bn1(self.depthwise(x))))

    def activate(self, x: Tensor) -> Tensor:
        """Convolve with a ReLU after each batch norm, as the exit flow does."""
        x = self.relu(self.bn1(self.depthwise(x)))
        return self.relu(self.bn2(self.pointwise(x)))
