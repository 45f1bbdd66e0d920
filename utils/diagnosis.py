"""How well weights tell right pseudo labels from wrong ones, and what ``--diagnose`` prints."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from utils.distributed import all_reduce_sum
from utils.evaluation import lay_out_scores

BINS = 1000  # of the weights, for the ranking
_GROUPS = 20  # of the bins, for the calibration


class WeightQuality:
    """Counts of right and wrong pixels by their weight, in [0, 1].

    Args:
        device: where weights and counts are.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(2, BINS, dtype=torch.float64, device=device)  # wrong, right
        self.sums = torch.zeros(2, BINS, dtype=torch.float64, device=device)  # of weights

    def update(self, weight: Tensor, right: Tensor) -> None:
        """Count pixels.

        Args:
            weight: float in [0, 1].
            right: bool, of the same shape: the label is the true one.
        """
        weight = weight.flatten().double()
        place = (weight * BINS).long().clamp(0, BINS - 1) + BINS * right.flatten().long()
        self.counts += torch.bincount(place, minlength=2 * BINS).view(2, BINS)
        self.sums += torch.bincount(place, weight, minlength=2 * BINS).view(2, BINS)

    def reduce(self) -> "WeightQuality":
        """Sum the counts over the processes; return itself. Collective."""
        self.counts, self.sums = all_reduce_sum(self.counts), all_reduce_sum(self.sums)
        return self

    def auroc(self) -> float:
        """Probability that a right pixel weighs more than a wrong one; NaN without either.

        Weights of one bin, 0.001 wide, count as equal.
        """
        wrong, right = self.counts
        below = wrong.cumsum(dim=0) - wrong / 2
        return ((right * below).sum() / (right.sum() * wrong.sum())).item()

    def calibration_error(self) -> float:
        """Mean distance of weight and share of right pixels, over 20 groups of equal width."""
        count, right, weight = self._groups()
        return ((right - weight).abs().sum() / count.sum()).item()

    def curve(self) -> list[dict[str, float]]:
        """Mean weight, share of right pixels and share of all pixels of each group that has any."""
        rows = zip(*(column.tolist() for column in self._groups()), strict=True)
        total = self.counts.sum().item()
        return [
            {"weight": weight / count, "right": right / count, "share": count / total}
            for count, right, weight in rows
            if count
        ]

    def report(self) -> dict[str, Any]:
        """Return the numbers and the curve by name."""
        return {
            "auroc": self.auroc(),
            "calibration_error": self.calibration_error(),
            "weight_on_wrong": self.share_on_wrong(),
            "curve": self.curve(),
        }

    def _groups(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sum over groups of equal width: pixels, right pixels, weights."""
        columns = self.counts.sum(dim=0), self.counts[1], self.sums.sum(dim=0)
        count, right, weight = (column.view(_GROUPS, -1).sum(dim=1) for column in columns)
        return count, right, weight

    def share_on_wrong(self) -> float:
        """Share of all weight that lies on wrong pixels; NaN if all weights are 0."""
        return (self.sums[0].sum() / self.sums.sum()).item()


def rank_correlation(one: Tensor, other: Tensor) -> float | None:
    """Spearman's correlation of two (N,) float tensors; equal values share their mean rank.

    Returns:
        A number in [-1, 1]; None where it is undefined: all values of a tensor are equal, one is
        NaN, or there are none.
    """
    if one.isnan().any() or other.isnan().any():
        return None
    ranks = torch.stack([_mean_ranks(one), _mean_ranks(other)])
    centred = ranks - ranks.mean(dim=1, keepdim=True)
    spread = centred.square().sum(dim=1).prod().sqrt()
    return (centred.prod(dim=0).sum() / spread).item() if spread > 0 else None


def _mean_ranks(values: Tensor) -> Tensor:
    _, groups, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(dim=0) - (counts - 1) / 2)[groups].double()


def describe_votes(fitted: Mapping[str, Any]) -> str:
    """Say in a line what ``votes.json`` holds: how far votes are believed, and why."""
    if "fit" not in fitted:
        what = f"exponents {fitted['teacher']:g} of the teacher, {fitted['votes']:g} of the votes"
        return f"too few labeled images to leave some out: {what}, not fitted"
    fit = fitted["fit"]
    what = f"exponents {fit['teacher']:.2f} of the teacher, {fit['votes']:.2f} of the votes"
    found = (
        f"cross entropy {fit['cross_entropy_alone']:.3f} -> {fit['cross_entropy']:.3f} "
        f"(less by {fit['gain']:.3f} +- {fit['error']:.3f}), "
        f"mIoU {100 * fit['miou_alone']:.1f} -> {100 * fit['miou']:.1f} on labeled images left out"
    )
    if fitted["votes"]:
        return f"votes on images enlarged {fitted['factor']:g} times, {what}: {found}"
    return f"votes do not help and are left out: {found} ({what})"


def lay_out_diagnosis(found: dict[str, Any]) -> str:
    """Lay out what ``model.diagnosis.diagnose`` returns, without the curves."""
    lines = [f"{describe_votes(found['votes'])}\n"] if "votes" in found else []
    for stage, labels in found["labels"].items():
        share = f"{labels['share']:.1%} of the pixels"
        lines += [
            f"labels of {stage}: {labels['images']} images, {share}",
            lay_out_scores(labels),
            "",
        ]
    lines.append(f"{'most probable class':<20}{'mIoU':>8}{'pixel accuracy':>20}")
    for source, result in found["classes"].items():
        lines.append(f"{source:<20}{result['miou']:>8.3f}{result['pixel_accuracy']:>20.3f}")
    lines += ["", f"{'weight':<20}{'AUROC':>8}{'calibration error':>20}{'weight on wrong':>18}"]
    for rule, quality in found["weights"].items():
        numbers = [quality[key] for key in ("auroc", "calibration_error", "weight_on_wrong")]
        lines.append("{:<20}{:>8.3f}{:>20.3f}{:>18.3f}".format(rule, *numbers))
    if "rank_correlation" in found:
        correlation = found["rank_correlation"]
        shown = "undefined" if correlation is None else f"{correlation:.3f}"
        lines += ["", f"rank correlation of image scores and mIoU: {shown}"]
    return "\n".join(lines)
