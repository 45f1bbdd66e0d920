"""Encoders in whose features labeled patches are compared (section 10 of docs/method.md).

To change what sees an image before votes are counted, this is the file.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dataset.catalog import dataset_info
from dataset.loader import RandomStreams
from model.networks import largest_stride, network_of
from model.networks.timm_encoders import patch_size_of, preprocessing_of
from model.ops.frozen import freeze
from utils import Preprocessing
from utils.config.schema import Config
from utils.device import Device
from utils.evaluation import base_size, resize_images

_MARGIN = 3  # places that a tile sees beyond each of its edges
_BESIDE = 1.2  # times what the largest layer reads and writes: what is kept beside it
_IMAGES = 16  # bytes a pixel: the enlarged image, and what it is made from


class VotingEncoder:
    """An encoder as it was before training, on images that are enlarged first.

    Args:
        config: of the run.
        device: where it works.
        backbone: which encoder. The student's own one has the weights it starts from, another one
            those of 'auto' (pretrained/README.md).

    Attributes:
        name: the backbone, and the file of its weights unless it is the student's own.
        channels: of its last map.

    Raises:
        UserError: no such network, or its weights are not here.
    """

    @torch.inference_mode()
    def __init__(self, config: Config, device: Device, backbone: str) -> None:
        self._device, self._long_side = device, config.inference.long_side
        self._window = config.inference.window
        self._stride, settings = largest_stride(backbone), config.model
        pretrained = settings.pretrained
        if backbone != settings.backbone:
            name = "deeplabv3plus" if patch_size_of(backbone) is None else "dpt"
            other = {"name": name, "backbone": backbone, "stem": "plain", "channels": None}
            settings, pretrained = settings.model_copy(update=other), "auto"
        # The network with which stage 1 began, as its encoder was pretrained: not dilated.
        settings = settings.model_copy(update={"output_stride": self._stride})
        torch.manual_seed(RandomStreams(config.seed, "1_supervised").torch_seed())
        classes = len(dataset_info(config.dataset).classes)
        net = freeze(network_of(settings, classes, pretrained), device)
        self._backbone, self.name = net.backbone, backbone
        if backbone != config.model.backbone:
            self.name += f" ({net.pretrained_from})"
        channels = net.backbone.channels
        self.channels = channels if isinstance(channels, int) else channels[-1]
        self._given, self._wanted = preprocessing_of(config.model.backbone), net.preprocessing

    @torch.inference_mode()
    def __call__(self, images: Tensor, factor: float) -> Tensor:
        """Return the last map, (B, D, h', w').

        Args:
            images: (B, 3, h, w) float of their files' size, normalised for the student.
            factor: of their sides.
        """
        size = tuple(self._stride * side for side in self.grid(images.shape[-2:], factor))
        images = renormalize(images, self._given, self._wanted)
        images = resize_images(images, size, self._wanted.interpolation)
        with self._device.autocast():
            if self._window is None or max(size) <= self._window.size:
                return self._backbone(images)[-1]
            return encode_tiles(
                lambda tile: self._backbone(tile)[-1], images, self._window.size, self._stride
            )

    def grid(self, size: Sequence[int], factor: float) -> tuple[int, int]:
        """Return (rows, columns) of the last map of an image of (height, width), enlarged.

        Images are enlarged to multiples of the stride: labels and votes then lie where the maps
        are.
        """
        base = base_size(size, self._long_side)
        return tuple(math.ceil(side * factor / self._stride) for side in base)

    @torch.inference_mode()
    def estimate_memory(self, size: tuple[int, int], factor: float) -> float:
        """Estimate the bytes that an image of (height, width) takes while it passes.

        Layers are looked at one by one, in a pass of a small image: most of the peak is what the
        one layer reads and writes that has the most to do. Within a fifth of what was measured for
        EfficientNet-Lite, ConvNeXt and ResNet on the CPU, with windows or not.
        """
        pixels = math.prod(self.grid(size, factor)) * self._stride**2
        side, peak = 8 * self._stride, 0

        def look(layer: nn.Module, given: Any, made: Any) -> None:
            nonlocal peak
            if not list(layer.children()):
                peak = max(peak, _count_bytes(given) + _count_bytes(made))

        hooks = [layer.register_forward_hook(look) for layer in self._backbone.modules()]
        with self._device.autocast():
            self._backbone(torch.zeros(1, 3, side, side, device=self._device.torch_device))
        for hook in hooks:
            hook.remove()
        passed = pixels if self._window is None else min(pixels, self._window.size**2)
        return _BESIDE * passed * peak / side**2 + _IMAGES * pixels


def renormalize(images: Tensor, given: Preprocessing, wanted: Preprocessing) -> Tensor:
    """Normalise (B, 3, h, w) images as another encoder wants them."""
    if given[:2] == wanted[:2]:
        return images
    old, new = (torch.tensor(p[:2], device=images.device).view(2, 3, 1, 1) for p in (given, wanted))
    return (images * old[1] + old[0] - new[0]) / new[1]


def _count_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_count_bytes, value)) if isinstance(value, tuple | list) else 0


def encode_tiles(
    encode: Callable[[Tensor], Tensor], images: Tensor, size: int, stride: int
) -> Tensor:
    """Encode images tile by tile: what the encoder needs of memory is that of a tile.

    Args:
        encode: (B, 3, h, w) to (B, D, h / stride, w / stride).
        images: (B, 3, H, W) float; H and W are multiples of the stride.
        size: of a tile with its margins, pixels, at most, unless the margins leave no place of it.
        stride: of the encoder.

    Returns:
        (B, D, H / stride, W / stride). Tiles see ``_MARGIN`` places beyond their edges, so that
        only what lies farther away is missing from the features.
    """
    height, width = images.shape[-2:]
    margin, rows = _MARGIN * stride, []
    side = max(1, size // stride - 2 * _MARGIN) * stride
    for top in range(0, height, side):
        row = []
        for left in range(0, width, side):
            y, x = max(0, top - margin), max(0, left - margin)
            tile = images[..., y : top + side + margin, x : left + side + margin]
            first = (top - y) // stride, (left - x) // stride
            last = (min(top + side, height) - y) // stride, (min(left + side, width) - x) // stride
            row.append(encode(tile)[..., first[0] : last[0], first[1] : last[1]])
        rows.append(torch.cat(row, dim=-1))
    return torch.cat(rows, dim=-2)
