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
EXPONENTS = [number / 10 for number in range(5, 31)]  # of the votes; the best one is taken
_FLOOR = 0.02  # added to votes: a class without any is not impossible
_JUDGED = 4096  # patches, about, by which an exponent is judged
_ROWS = 2048  # patches that are compared at once


class LabeledPatches(NamedTuple):
    """Features of labeled images' patches, and what their labels show there."""

    features: Tensor  # (N, D) float, of length 1
    shares: Tensor  # (N, C) float, sum to 1: the classes' shares of the labeled pixels
    image: Tensor  # (N,) long: which image they are of


class Calibration(NamedTuple):
    """How votes become probabilities, and how well that does."""

    exponent: float  # above 1 votes are sharpened, below 1 flattened
    cross_entropy: float  # nats a patch, of votes of the other images


def labeled_patches(
    features: Tensor, label: Tensor, image: Tensor, num_classes: int
) -> LabeledPatches:
    """Cut the maps of labeled images into patches; those that are mostly ignored are left out.

    Args:
        features: (B, D, h, w) float.
        label: (B, H, W) long in [0, C), or 255 = ignored.
        image: (B,) long, a number of each image.
        num_classes: C.
    """
    size = tuple(features.shape[-2:])
    maps = [
        F.adaptive_avg_pool2d((label == class_id).float(), size) for class_id in range(num_classes)
    ]
    shares = torch.stack(maps, dim=-1).flatten(0, 2)
    known = shares.sum(dim=1)
    kept = known > 0.5
    image = image.to(kept.device).repeat_interleave(size[0] * size[1])
    return LabeledPatches(_rows(features)[kept], (shares / known.unsqueeze(1))[kept], image[kept])


def neighbour_votes(features: Tensor, patches: LabeledPatches) -> Tensor:
    """Let the nearest labeled patches vote on every place of (B, D, h, w) maps.

    Returns:
        (B, C, h, w) float32 in [0, 1], summing to 1 over C: the mean of the shares of the 30
        nearest patches by cosine, weighted by the softmax of their cosines over 0.05.
    """
    votes = torch.cat([_votes(rows, None, patches) for rows in _rows(features).split(_ROWS)])
    batch, _, height, width = features.shape
    return votes.view(batch, height, width, -1).permute(0, 3, 1, 2)


def calibrate(patches: LabeledPatches) -> Calibration:
    """Fit the exponent of the votes: labeled patches are voted on by those of the other images.

    Returns:
        The exponent, of those in ``EXPONENTS``, with the least mean cross entropy between the
        shares and the sharpened votes of about 4,000 patches. Exponent 1 and infinity for patches
        of one image.
    """
    if len(patches.image.unique()) < 2:
        return Calibration(1.0, torch.inf)
    judged = LabeledPatches(*(rows[:: max(1, len(rows) // _JUDGED)] for rows in patches))
    votes = torch.cat(
        [
            _votes(*rows, patches)
            for rows in zip(judged.features.split(_ROWS), judged.image.split(_ROWS), strict=True)
        ]
    )
    losses = [
        -(judged.shares * sharpened(votes, exponent).log()).sum(dim=1).mean().item()
        for exponent in EXPONENTS
    ]
    best = min(range(len(losses)), key=losses.__getitem__)
    return Calibration(EXPONENTS[best], losses[best])


def sharpened(votes: Tensor, exponent: float) -> Tensor:
    """Raise votes, (B, C, ...) float in [0, 1], to a power: positive, summing to 1 over C."""
    return ((votes + _FLOOR).log() * exponent).softmax(dim=1)


def pooled(probability: Tensor, votes: Tensor, prior: Tensor) -> Tensor:
    """Combine two opinions that are independent given the class, by Bayes' rule.

    Args:
        probability: (B, C, H, W) float in [0, 1], sums to 1 over C: a network's.
        votes: the same, positive: ``sharpened`` votes.
        prior: (C,) float in [0, 1]: the classes' shares of the labeled patches. Both opinions hold
            it; it must count once.

    Returns:
        (B, C, H, W) float32, sums to 1 over C: probability * votes / prior, normalised.
    """
    prior = (prior + _FLOOR).log().view(-1, 1, 1)
    return (probability.clamp_min(1e-6).log() + votes.log() - prior).softmax(dim=1)


def _votes(rows: Tensor, image: Tensor | None, patches: LabeledPatches) -> Tensor:
    """Vote on (R, D) directions, without the patches of (R,) images: (R, C)."""
    cosines = rows @ patches.features.T
    if image is not None:
        cosines = cosines.masked_fill(image.unsqueeze(1) == patches.image, -torch.inf)
    cosines, nearest = cosines.topk(min(NEIGHBOURS, len(patches.features)))
    weight = (cosines.float() / TEMPERATURE).softmax(dim=1)
    return torch.einsum("nk,nkc->nc", weight, patches.shares[nearest])


def _rows(features: Tensor) -> Tensor:
    """Return the places of (B, D, h, w) maps as (B * h * w, D) directions."""
    return F.normalize(features.float(), dim=1).permute(0, 2, 3, 1).flatten(0, 2)
