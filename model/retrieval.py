"""What the labeled images say of an unlabeled one: votes of the nearest labeled patches.

The features are those of an encoder as it was before training. They know nothing of the teacher,
so that their votes are evidence that the teacher's probabilities do not hold already.

Source: ours; docs/method.md, section 13, and docs/rectifier.md for what else was tried. Retrieval
from a memory of labeled patches is Hummingbird's (Balazevic et al., NeurIPS 2023).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 30  # patches that vote
TEMPERATURE = 0.05  # of the cosines, for the weight of a vote
_FLOOR = 0.02  # added to votes: a class without any is not impossible
_ROWS = 2048  # patches that are compared at once


class LabeledPatches(NamedTuple):
    """Features of labeled images' patches, and what their labels show there."""

    features: Tensor  # (N, D) float, of length 1
    shares: Tensor  # (N, C) float, sum to 1: the classes' shares of the labeled pixels


def labeled_patches(features: Tensor, label: Tensor, num_classes: int) -> LabeledPatches:
    """Cut the maps of labeled images into patches; those that are mostly ignored are left out.

    Args:
        features: (B, D, h, w) float.
        label: (B, H, W) long in [0, C), or 255 = ignored.
        num_classes: C.
    """
    size = tuple(features.shape[-2:])
    maps = [
        F.adaptive_avg_pool2d((label == class_id).float(), size) for class_id in range(num_classes)
    ]
    shares = torch.stack(maps, dim=-1).flatten(0, 2)
    known = shares.sum(dim=1)
    kept = known > 0.5
    return LabeledPatches(_rows(features)[kept], (shares / known.unsqueeze(1))[kept])


def neighbour_votes(features: Tensor, patches: LabeledPatches) -> Tensor:
    """Let the nearest labeled patches vote on every place of (B, D, h, w) maps.

    Returns:
        (B, C, h, w) float32 in [0, 1], summing to 1 over C: the mean of the shares of the 30
        nearest patches by cosine, weighted by the softmax of their cosines over 0.05.
    """
    votes = []
    for rows in _rows(features).split(_ROWS):
        cosines, nearest = (rows @ patches.features.T).topk(min(NEIGHBOURS, len(patches.features)))
        weight = (cosines.float() / TEMPERATURE).softmax(dim=1)
        votes.append(torch.einsum("nk,nkc->nc", weight, patches.shares[nearest]))
    batch, _, height, width = features.shape
    return torch.cat(votes).view(batch, height, width, -1).permute(0, 3, 1, 2)


def pooled(probability: Tensor, votes: Tensor, share: float) -> Tensor:
    """Pool a network's probabilities with votes, both (B, C, H, W), in the logarithm.

    Args:
        probability: float in [0, 1], sums to 1 over C.
        votes: the same.
        share: of the votes, in [0, 1]; 0 returns the probability.

    Returns:
        (B, C, H, W) float32, sums to 1 over C.
    """
    if share == 0:
        return probability
    logits = (1 - share) * probability.clamp_min(1e-6).log() + share * (votes + _FLOOR).log()
    return logits.softmax(dim=1)


def _rows(features: Tensor) -> Tensor:
    """Return the places of (B, D, h, w) maps as (B * h * w, D) directions."""
    return F.normalize(features.float(), dim=1).permute(0, 2, 3, 1).flatten(0, 2)
