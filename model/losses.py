"""Cross entropies: plain, rectified by cross-image consistency, and of hard pixels only.

Of several processes each gets its part of the mean over all their pixels; the parts add up. All
call a loss together. So do the parts of a batch that passes in several: ``batch_label`` holds the
labels of all of it, (N, H, W), and None means that this part is all.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from utils import IGNORE
from utils.distributed import everyones, total


def cross_entropy(logits: Tensor, label: Tensor, batch_label: Tensor | None = None) -> Tensor:
    """Cross entropy in float32, averaged over pixels that are not ignored; 0 if there are none.

    Args:
        logits: (B, C, H, W) float.
        label: (B, H, W) long in [0, C), or 255 = ignored.
        batch_label: see above.
    """
    return _mean_over_valid(_pixel_loss(logits, label), label, batch_label)


def rectified_cross_entropy(
    logits: Tensor, pseudo_label: Tensor, weight: Tensor, batch_label: Tensor | None = None
) -> Tensor:
    """Weighted cross entropy, averaged over pixels that are not ignored; 0 if there are none.

    Args:
        logits: (B, C, H, W) float.
        pseudo_label: (B, H, W) long in [0, C), or 255 = ignored.
        weight: (B, H, W) float in [0, 1], from ``rectification_weight``.
        batch_label: see above; pseudo labels.

    Returns:
        Scalar float32. The divisor counts pixels, not weights: a batch that clashes everywhere
        has a small loss.

    Source: the paper's rectified loss; METHOD piece 4. Deviates from the published code, where
    ignored and padded pixels count in the mean.
    """
    loss = weight * _pixel_loss(logits, pseudo_label)
    return _mean_over_valid(loss, pseudo_label, batch_label)


def ohem_cross_entropy(
    logits: Tensor,
    label: Tensor,
    threshold: float = 0.7,
    min_kept: int = 100_000,
    batch_label: Tensor | None = None,
) -> Tensor:
    """Cross entropy of the hard pixels: true-class probability under a threshold.

    Args:
        logits: (B, C, H, W) float.
        label: (B, H, W) long in [0, C), or 255 = ignored.
        threshold: pixels whose probability of the true class is at least this are left out ...
        min_kept: ... unless fewer than so many remain: then the hardest ``min_kept`` are kept.
        batch_label: see above. A part ranks its own pixels and keeps its share of ``min_kept``.

    Returns:
        Scalar float32, the mean over kept pixels; 0 if every pixel is ignored. Of a part, its
        share of the mean over parts, which is not the batch's.

    Source: online hard example mining (Shrivastava et al., CVPR 2016) as ST++ and U2PL use it.
    """
    loss, valid = _pixel_loss(logits, label), label != IGNORE
    share = 1.0 if batch_label is None else len(label) / len(batch_label)
    room = min(math.ceil(min_kept * share), int(total(torch.tensor(label.numel()))))
    ranked = loss.detach().masked_fill(~valid, -torch.inf).flatten()
    hardest = ranked.topk(min(room, len(ranked))).values
    hardest = F.pad(hardest, (0, room - len(hardest)), value=-torch.inf)
    hardest = everyones(hardest).topk(room).values
    # -log(threshold) is the loss at the threshold: ranking by loss is ranking by probability.
    kept = valid & (loss >= hardest[-1].clamp_max(-math.log(threshold)))
    return share * (loss * kept).sum() / total(kept.sum()).clamp_min(1)


def _pixel_loss(logits: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), label, ignore_index=IGNORE, reduction="none")


def _mean_over_valid(loss: Tensor, label: Tensor, batch_label: Tensor | None) -> Tensor:
    labels = label if batch_label is None else batch_label
    return loss.sum() / total((labels != IGNORE).sum()).clamp_min(1)
