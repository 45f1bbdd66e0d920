"""From a network to class probabilities: whole images or windows, several scales, flips."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.config.schema import WindowSection
from utils.device import Device
from utils.distributed import total


class ConfusionMatrix:
    """Counts of (true class, predicted class) over all pixels seen.

    Args:
        num_classes: C. Pixels whose label is not in [0, C), 255 among them, are left out.
        device: where predictions and labels are, and the counts.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count integer tensors of equal shape; predictions must be in [0, C)."""
        valid = (label >= 0) & (label < self.num_classes)
        pairs = label[valid].long() * self.num_classes + prediction[valid].long()
        counted = torch.bincount(pairs, minlength=self.num_classes**2)
        self.counts += counted.view(self.num_classes, self.num_classes)

    def reduce(self) -> "ConfusionMatrix":
        """Add what all processes counted; return itself. Collective."""
        self.counts = total(self.counts)
        return self

    def iou(self) -> Tensor:
        """(C,) float64 in [0, 1]; NaN for a class that is in neither labels nor predictions."""
        hits = self.counts.diagonal().double()
        return hits / (self.counts.sum(dim=0) + self.counts.sum(dim=1) - hits)

    def mean_iou(self) -> float:
        """Mean in [0, 1] over classes that occur in label or prediction; NaN if none does."""
        return self.iou().nanmean().item()

    def pixel_accuracy(self) -> float:
        """Share of the counted pixels that are right, in [0, 1]; NaN if none was counted."""
        return (self.counts.diagonal().sum() / self.counts.sum()).item()


@dataclass(frozen=True)
class Predictor:
    """Class probabilities of images. Validation, labeling and ``eval.py`` all use this.

    Attributes:
        net: in eval mode, best ``frozen``; ``classify(extract(images))`` gives logits of any size.
        device: where, in which precision.
        window: cut images into overlapping windows of this size; None passes them whole.
        scales: factors on the height and width of the image; probabilities are averaged over them.
        flip: average over the mirrored image too.
        average_at: share of the answer's height and width at which several views are averaged.
    """

    net: nn.Module
    device: Device
    window: WindowSection | None = None
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    average_at: float = 1.0

    @torch.inference_mode()
    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Predict.

        Args:
            images: (B, 3, h, w) float, normalised, on any device.
            size: (H, W) of the answer, which may differ from the images'.

        Returns:
            (B, C, H, W) float32 probabilities, on the device. They sum to 1 over C.
        """
        images = self.device.move(images)
        views = len(self.scales) * (2 if self.flip else 1)
        share = 1.0 if views == 1 else self.average_at
        meeting = tuple(max(1, round(side * share)) for side in size)
        total = torch.zeros((), device=images.device)
        for scale in self.scales:
            view = _scaled(images, scale)
            if self.flip:
                both = self._probabilities(torch.cat([view, view.flip(-1)]), meeting)
                straight, mirrored = both.chunk(2)
                total = total + straight + mirrored.flip(-1)
            else:
                total = total + self._probabilities(view, meeting)
        return _resized(total / views, size)

    def _probabilities(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        if self.window is None or max(images.shape[-2:]) <= self.window.size:
            return _resized(self._logits(images), size).softmax(dim=1)
        return _resized(self._by_windows(images, self.window), size)

    def _by_windows(self, images: Tensor, window: WindowSection) -> Tensor:
        """Average the probabilities of all windows that show a pixel, at the images' size."""
        height, width = images.shape[-2:]
        shape = min(window.size, height), min(window.size, width)
        weight = _window_weight(shape, window.weighting, images.device)
        places = list(_window_places((height, width), shape, window.step))
        total, weights = 0.0, torch.zeros(height, width, device=images.device)
        step = max(1, window.batch_size // len(images))  # places that are cut out at once
        for start in range(0, len(places), step):
            chosen = places[start : start + step]
            crops = torch.cat([images[..., rows, columns] for rows, columns in chosen])
            logits = torch.cat([self._logits(part) for part in crops.split(window.batch_size)])
            answers = _resized(logits, shape).softmax(dim=1).chunk(len(chosen))
            for (rows, columns), answer in zip(chosen, answers, strict=True):
                if isinstance(total, float):
                    total = answer.new_zeros(len(images), answer.shape[1], height, width)
                total[..., rows, columns] += answer * weight
                weights[rows, columns] += weight
        return total / weights

    def _logits(self, images: Tensor) -> Tensor:
        """Return logits at the size that the network has them in."""
        with self.device.autocast():
            return self.net.classify(self.net.extract(images)).float()


def _window_places(
    size: tuple[int, int], shape: tuple[int, int], step: float
) -> Iterator[tuple[slice, slice]]:
    """Yield (rows, columns) of windows; those at the far edges are snapped to the image."""
    starts = []
    for length, side in zip(size, shape, strict=True):
        stride = max(1, round(side * step))
        starts.append([*range(0, length - side, stride), length - side])
    for top in starts[0]:
        for left in starts[1]:
            yield slice(top, top + shape[0]), slice(left, left + shape[1])


def _window_weight(shape: tuple[int, int], weighting: str, device: torch.device) -> Tensor:
    """Say how much each pixel of a window counts: (h, w), all 1, or a Gaussian about its middle."""
    if weighting == "uniform":
        return torch.ones(shape, device=device)
    lines = []
    for side in shape:
        place = (torch.arange(side, device=device) + 0.5) / side - 0.5
        lines.append(torch.exp(-0.5 * (place / 0.25) ** 2))  # sigma is a quarter of the side
    return torch.outer(*lines)


def _scaled(images: Tensor, scale: float) -> Tensor:
    if scale == 1.0:
        return images
    return _resized(images, tuple(max(1, round(side * scale)) for side in images.shape[-2:]))


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=True)
