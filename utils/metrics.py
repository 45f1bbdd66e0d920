"""Intersection over union from a confusion matrix."""

import torch
from torch import Tensor

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
