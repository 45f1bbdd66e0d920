"""From a network to class probabilities: whole images, several scales, flips."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.precision import Device


@dataclass(frozen=True)
class Predictor:
    """Class probabilities of whole images. Validation, labeling and ``eval.py`` all use this.

    Attributes:
        net: in eval mode while it predicts.
        device: where, in which precision.
        scales: factors on the height and width of the image; softmax is averaged over them.
        flip: average over the mirrored image too.
    """

    net: nn.Module
    device: Device
    scales: Sequence[float] = (1.0,)
    flip: bool = False

    @torch.inference_mode()
    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Predict.

        Args:
            images: (B, 3, h, w) float, normalised, on any device.
            size: (H, W) of the answer, which may differ from the images'.

        Returns:
            (B, C, H, W) float32 probabilities, on the device. They sum to 1 over C.
        """
        self.net.eval()
        images = self.device.move(images)
        total = torch.zeros((), device=self.device.device)
        for scale in self.scales:
            view = _scaled(images, scale)
            total = total + self._probabilities(view, size)
            if self.flip:
                total = total + self._probabilities(view.flip(-1), size).flip(-1)
        return total / (len(self.scales) * (2 if self.flip else 1))

    def _probabilities(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        with self.device.autocast():
            logits = self.net(images).logits.float()
        if logits.shape[-2:] != size:
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=True)
        return logits.softmax(dim=1)


def _scaled(images: Tensor, scale: float) -> Tensor:
    if scale == 1.0:
        return images
    size = [max(1, round(side * scale)) for side in images.shape[-2:]]
    return F.interpolate(images, size, mode="bilinear", align_corners=True)
