"""Cross entropies: plain, rectified by cross-image consistency, and of hard pixels only.

``pixels`` is what the sum over pixels is divided by: the valid pixels of the whole batch, where
``label`` is a part of it (one of several processes, or of ``accumulate``). The losses of the parts
then add up to that of the batch. None: ``label`` is the whole batch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from utils import IGNORE


def cross_entropy(logits: Tensor, label: Tensor, pixels: Tensor | None = None) -> Tensor:
    """Cross entropy in float32, averaged over pixels that are not ignored; 0 if there are none.

    Args:
        logits: (B, C, H, W) float.
        label: (B, H, W) long in [0, C), or 255 = ignored.
        pixels: () number, see above.
    """
    return _pixel_loss(logits, label).sum() / _divisor(label, pixels)


def rectified_cross_entropy(
    logits: Tensor, pseudo_label: Tensor, weight: Tensor, pixels: Tensor | None = None
) -> Tensor:
    """Weighted cross entropy, averaged over pixels that are not ignored; 0 if there are none.

    Args:
        logits: (B, C, H, W) float.
        pseudo_label: (B, H, W) long in [0, C), or 255 = ignored.
        weight: (B, H, W) float in [0, 1].
        pixels: () number, see above.

    Returns:
        Scalar float32. The divisor counts pixels, not weights: a batch of low weights has a small
        loss.

    Source: the paper's rectified loss; docs/method.md, section 4. Deviates from the published
    code, where ignored and padded pixels count in the mean.
    """
    return (weight * _pixel_loss(logits, pseudo_label)).sum() / _divisor(pseudo_label, pixels)


def ohem_cross_entropy(
    logits: Tensor,
    label: Tensor,
    pixels: Tensor | None = None,
    *,
    threshold: float = 0.7,
    min_kept: int = 100_000,
) -> Tensor:
    """Cross entropy of the hard pixels: true-class probability under a threshold.

    Args:
        logits: (B, C, H, W) float.
        label: (B, H, W) long in [0, C), or 255 = ignored.
        pixels: () number, see above. A part of a batch ranks its own pixels, keeps its share of
            ``min_kept``, and its mean is weighted by its share of the valid pixels.
        threshold: pixels whose probability of the true class is at least this are excluded ...
        min_kept: ... unless fewer than so many remain: then the hardest ``min_kept`` are kept.

    Returns:
        Scalar float32, the mean over kept pixels; 0 if every pixel is ignored.

    Source: online hard example mining (Shrivastava et al., CVPR 2016) as ST++ and U2PL use it.
    """
    loss, valid = _pixel_loss(logits, label), label != IGNORE
    share = valid.sum() / _divisor(label, pixels)
    kept_at_least = min(math.ceil(min_kept * float(share)), label.numel())
    ranked = loss.detach().masked_fill(~valid, -torch.inf).flatten()
    hardest = ranked.topk(max(1, kept_at_least)).values
    # -log(threshold) is the loss at the threshold: ranking by loss is ranking by probability.
    kept = valid & (loss >= hardest[-1].clamp_max(-math.log(threshold)))
    return share * (loss * kept).sum() / kept.sum().clamp_min(1)


def _pixel_loss(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), label, ignore_index=IGNORE, reduction="none")


def _divisor(label: Tensor, pixels: Tensor | None) -> Tensor:
    return ((label != IGNORE).sum() if pixels is None else pixels).clamp_min(1)
