"""What the labeled images say of an unlabeled one: votes of the nearest labeled patches.

The features are those of an encoder as it was before training. They know nothing of the teacher,
so that their votes are evidence that the teacher's probabilities do not hold already.

Source: ours; docs/method.md, section 13, and docs/rectifier.md for what else was tried. Retrieval
from a memory of labeled patches is Hummingbird's (Balazevic et al., NeurIPS 2023).
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 30  # patches that vote
TEMPERATURE = 0.05  # of the cosines, for the weight of a vote
EXPONENTS = [number / 10 for number in range(31)]  # of which the best one is taken
_SMOOTHING = 0.05  # share of the prior in votes: a class without any is not impossible
_JUDGED = 4096  # patches by which an exponent is judged, at most
_ROWS = 2048  # patches that are compared at once


class LabeledPatches(NamedTuple):
    """Features of labeled images' patches, and what their labels show there."""

    features: Tensor  # (N, D) float, of length 1
    shares: Tensor  # (N, C) float, sum to 1: the classes' shares of the labeled pixels
    image: Tensor  # (N,) long: which image they are of

    def prior(self) -> Tensor:
        """Return the classes' shares of all patches, (C,) positive float, sum 1."""
        prior = self.shares.mean(dim=0).clamp_min(1e-4)
        return prior / prior.sum()


class Calibration(NamedTuple):
    """How much votes tell: of the labels of images that do not vote."""

    exponent: float  # of the likelihood ratio; 0: nothing, 1: as much as they say
    cross_entropy: float  # nats a patch


def labeled_patches(
    features: Tensor,
    label: Tensor,
    image: Tensor,
    num_classes: int,
    limit: int,
    rng: np.random.Generator,
) -> LabeledPatches:
    """Cut the maps of labeled images into patches; those that are mostly ignored are left out.

    Args:
        features: (B, D, h, w) float.
        label: (B, H, W) long in [0, C), or 255 = ignored.
        image: (B,) long, a number of each image.
        num_classes: C.
        limit: of more patches so many are drawn at random.
        rng: draws them.
    """
    size = tuple(features.shape[-2:])
    maps = [
        F.adaptive_avg_pool2d((label == class_id).float(), size) for class_id in range(num_classes)
    ]
    shares = torch.stack(maps, dim=-1).flatten(0, 2)
    known = shares.sum(dim=1)
    kept = (known > 0.5).nonzero().flatten()
    if len(kept) > limit:
        kept = kept[torch.from_numpy(rng.permutation(len(kept))[:limit]).to(kept.device)]
    image = image.to(kept.device).repeat_interleave(size[0] * size[1])
    directions = F.normalize(_rows(features)[kept].float(), dim=1)
    return LabeledPatches(directions, (shares / known.unsqueeze(1))[kept], image[kept])


def neighbour_votes(features: Tensor, patches: LabeledPatches) -> Tensor:
    """Let the nearest labeled patches vote on every place of (B, D, h, w) maps.

    Returns:
        (B, C, h, w) float32 in [0, 1], summing to 1 over C: the mean of the shares of the 30
        nearest patches by cosine, weighted by the softmax of their cosines over 0.05.
    """
    parts = (F.normalize(rows.float(), dim=1) for rows in _rows(features).split(_ROWS))
    votes = torch.cat([_votes(rows, None, patches) for rows in parts])
    batch, _, height, width = features.shape
    return votes.view(batch, height, width, -1).permute(0, 3, 1, 2)


def calibrate(patches: LabeledPatches) -> Calibration:
    """Fit the exponent of the votes: labeled patches are voted on by those of the other images.

    Returns:
        The exponent, of those in ``EXPONENTS``, with the least mean cross entropy between the
        shares and ``sharpened`` votes, of 4,096 patches at most. For patches of one image
        exponent 1, and infinity.
    """
    if len(patches.image.unique()) < 2:
        return Calibration(1.0, math.inf)
    judged = LabeledPatches(*(rows[:: math.ceil(len(rows) / _JUDGED)] for rows in patches))
    parts = zip(judged.features.split(_ROWS), judged.image.split(_ROWS), strict=True)
    votes, prior = torch.cat([_votes(*rows, patches) for rows in parts]), patches.prior()
    return min(
        (
            Calibration(
                exponent,
                -(judged.shares * sharpened(votes, prior, exponent).log()).sum(1).mean().item(),
            )
            for exponent in EXPONENTS
        ),
        key=lambda fit: fit.cross_entropy,
    )


def sharpened(votes: Tensor, prior: Tensor, exponent: float) -> Tensor:
    """Turn votes into probabilities: the prior times the votes' likelihood ratio to a power.

    Args:
        votes: (B, C, ...) float in [0, 1], sums to 1 over C.
        prior: (C,) positive float, sum 1. Votes that equal it tell nothing, whatever the exponent.
        exponent: from ``calibrate``.

    Returns:
        Positive, (B, C, ...), sums to 1 over C.
    """
    prior = prior.view(-1, *[1] * (votes.dim() - 2))
    ratio = (1 - _SMOOTHING) * votes / prior + _SMOOTHING
    return (prior.log() + exponent * ratio.log()).softmax(dim=1)


def pooled(probability: Tensor, votes: Tensor, prior: Tensor, adjustment: float = 0.0) -> Tensor:
    """Combine two opinions that are independent given the class, by Bayes' rule.

    Args:
        probability: (B, C, H, W) float in [0, 1], sums to 1 over C: a network's.
        votes: the same, positive: ``sharpened`` votes.
        prior: (C,) positive float, sum 1. Both opinions hold it; it must count once.
        adjustment: share of the prior that is divided out of the result, too, for rare classes; 0:
            none, 1: all classes are equally probable without evidence.

    Returns:
        (B, C, H, W) float32, sums to 1 over C: probability * votes / prior ** (1 + adjustment),
        normalised.

    Source: docs/method.md, section 13; the adjustment is Menon et al., ICLR 2021, section 4.1.
    """
    prior = (1 + adjustment) * prior.log().view(-1, 1, 1)
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
    """Return the places of (B, D, h, w) maps as (B * h * w, D) features."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)
