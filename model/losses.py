"""Cross entropies: plain, rectified by cross-image consistency, of hard pixels only; soft Dice.

``pixels`` is what the sum over pixels is divided by: the valid pixels of the whole batch, where
``label`` is a part of it (one of several processes, or of ``accumulate``). The losses of the parts
then add up to that of the batch. None: ``label`` is the whole batch.

``class_weights``, (C,) float, multiply the cross entropy of each pixel by that of its label's
class. The divisor still counts pixels: weights whose mean over these is 1 keep the loss's scale.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from utils import IGNORE
from utils.config.schema import LossSection
from utils.errors import UserError


def cross_entropy(
    logits: Tensor,
    label: Tensor,
    pixels: Tensor | None = None,
    *,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Cross entropy in float32, averaged over pixels that are not ignored; 0 if there are none.

    Args:
        logits: (B, C, H, W) float.
        label: (B, H, W) long in [0, C), or 255 = ignored.
        pixels: () number, see above.
        class_weights: (C,), see above; None: 1.
    """
    return _pixel_loss(logits, label, class_weights).sum() / _divisor(label, pixels)


def rectified_cross_entropy(
    logits: Tensor,
    pseudo_label: Tensor,
    weight: Tensor,
    pixels: Tensor | None = None,
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
    loss = _pixel_loss(logits, pseudo_label)
    return (weight * loss).sum() / _divisor(pseudo_label, pixels)


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


def dice_loss(logits: Tensor, label: Tensor, pixels: Tensor | None = None) -> Tensor:
    """Soft Dice loss: ``rectified_dice_loss`` with all weights 1."""
    return rectified_dice_loss(logits, label, torch.ones_like(label, dtype=torch.float32), pixels)


def rectified_dice_loss(
    logits: Tensor, pseudo_label: Tensor, weight: Tensor, pixels: Tensor | None = None
) -> Tensor:
    """Soft Dice loss of weighted pixels: a class counts alike however few its pixels are.

    With probabilities p and w = weight, 1 - 2 sum(w p) / (sum(w p^2) + sum(w)) of each class of an
    image, where the first and the last sum are over its label's pixels of the class; averaged over
    the classes that the label shows, then over images.

    Args:
        logits: (B, C, H, W) float.
        pseudo_label: (B, H, W) long in [0, C), or 255 = ignored.
        weight: (B, H, W) float in [0, 1].
        pixels: () number, see above.

    Returns:
        Scalar float32 in [0, 1]. An image counts by its share of ``pixels``, times its mean weight:
        parts of a batch add up, and a batch of low weights has a small loss; 0 if all is ignored.

    Source: Milletari et al., 3DV 2016, whose denominator is squared, as it is in SSL4MIS and
    UniMatch. Deviates from these: they sum over the whole batch and average over all classes, with
    a small number added to both sides of the fraction. Then parts do not add up, and a class that a
    batch lacks costs 1 with almost no gradient.
    """
    valid = pseudo_label != IGNORE
    weight = (weight.float() * valid).unsqueeze(1)
    probability = logits.float().softmax(dim=1)
    classes = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1)
    area = weight * (pseudo_label.unsqueeze(1) == classes)
    areas = area.sum(dim=(2, 3))  # (B, C), as what follows
    shown = areas > 0
    sides = (weight * probability.square()).sum(dim=(2, 3)) + areas
    dice = 2 * (area * probability).sum(dim=(2, 3)) / sides.where(shown, 1)
    of_images = ((1 - dice) * shown).sum(dim=1) / shown.sum(dim=1).clamp_min(1)
    return (weight.sum(dim=(1, 2, 3)) * of_images).sum() / _divisor(pseudo_label, pixels)


def balanced_weights(pixels: Sequence[float]) -> list[float]:
    """Return class weights in inverse proportion to the classes' pixels, whose mean weight is 1.

    A class without pixels has weight 1.
    """
    shown = sum(count > 0 for count in pixels)
    return [sum(pixels) / (shown * count) if count else 1.0 for count in pixels]


def scale_weights(weights: Sequence[float], pixels: Sequence[int]) -> list[float]:
    """Scale class weights to a mean of 1 over labeled pixels: the loss keeps its scale.

    Weights of 0 for all classes that have pixels stay as they are.
    """
    total = sum(weight * count for weight, count in zip(weights, pixels, strict=True))
    return [weight * sum(pixels) / total if total else weight for weight in weights]


def refuse_class_weights(settings: LossSection, classes: Sequence[str]) -> None:
    """Compare ``loss.class_weights`` with the classes; a ``UserError`` if their numbers differ."""
    weights = settings.class_weights
    if isinstance(weights, list) and len(weights) != len(classes):
        raise UserError(
            f"loss.class_weights: {len(weights)} numbers for {len(classes)} classes; give one each "
            f"for {', '.join(classes)}"
        )


def _pixel_loss(logits: Tensor, label: Tensor, class_weights: Tensor | None = None) -> Tensor:
    return F.cross_entropy(
        logits.float(), label, class_weights, ignore_index=IGNORE, reduction="none"
    )


def _divisor(label: Tensor, pixels: Tensor | None) -> Tensor:
    return ((label != IGNORE).sum() if pixels is None else pixels).clamp_min(1)
