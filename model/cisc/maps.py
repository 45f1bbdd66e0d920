"""The paper's equations, as pure functions: sections 1 to 4, 7 and 8 of docs/method.md.

Prototypes, similarity maps (CISC maps if the prototype is of another image), the consistency loss
of stage 1, the weights of the rectified loss, and the reliability that stage 3 ranks by. Stage 1
uses them through ``train.py``, retraining through ``students.py``, selection through
``anchors.py``.

Notation: B images of H x W pixels; ``features`` (B, D, h, w) of a network; a prototype (B, D) is
the mean feature of a region; 255 marks pixels that are ignored. Everything is computed in float32
(float64 stays float64), also under autocast: cosines leave [0, 1] by rounding, and binary cross
entropy in half precision is not safe.

Source: Wu et al., TPAMI 2023, doi 10.1109/TPAMI.2022.3233584.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.ops.bilinear import at_least_float32, full_precision, pull_back, resize
from utils import IGNORE

_AREA_EPS = 0.0005  # section 1: an empty region has a zero prototype
_NORM_EPS = 1e-8
_PROBABILITY_EPS = 1e-6  # bounds the slope of binary cross entropy where a cosine is 0 or 1


def masked_average_pooling(features: Tensor, mask: Tensor) -> Tensor:
    """Average the features of a region: its prototype (section 1).

    The definition resizes the features bilinearly to (H, W). Resizing is linear: pulling the mask
    back to (h, w) by its adjoint gives the same sums without D channels at full size.

    Args:
        features: (B, D, h, w) float.
        mask: (B, H, W) bool or float in [0, 1], the region.

    Returns:
        (B, D) float32: zeros for an empty region. Differentiable in the features.
    """
    mask = mask.to(at_least_float32(features))
    pulled = pull_back(mask, features.shape[-2:])
    with full_precision(features):
        sums = torch.einsum("bdhw,bhw->bd", features.to(mask.dtype), pulled)
    return sums / (mask.sum(dim=(1, 2)) + _AREA_EPS).unsqueeze(1)


def similarity_map(features: Tensor, prototype: Tensor, size: tuple[int, int]) -> Tensor:
    """Show where images look like prototypes; if those are of other images, CISC maps (section 2).

    Args:
        features: (B, D, h, w) float.
        prototype: (B, D) float; a zero prototype gives a zero map.
        size: (H, W) of the result.

    Returns:
        (B, H, W) float32 in [0, 1]: the clamped cosine, resized bilinearly as one channel.
    """
    return resize(_cosines(features, prototype.unsqueeze(1)), size).squeeze(1)


def consistency_loss(
    features: Tensor,
    query_features: Tensor,
    label: Tensor,
    query_label: Tensor,
    shared_class: Tensor,
    pairs: Tensor | None = None,
) -> Tensor:
    """Train pairs of labeled images to find their shared class in each other (section 3).

    Args:
        features: (B, D, h, w) float, of the images.
        query_features: the same of their partners.
        label: (B, H, W) long, of the images, 255 = ignored.
        query_label: the same of their partners.
        shared_class: (B,) long, the class id that the crops of a pair share, 255 if none.
        pairs: () number of pairs that share a class in the batch that these are a part of; None:
            they are all of it. The losses of the parts add up.

    Returns:
        Scalar float32 >= 0: binary cross entropy between each image's CISC map and its region of
        the class, averaged over valid pixels, both directions added, averaged over the pairs
        that share a class; 0 if none does.
    """
    region = class_region(label, shared_class)
    query_region = class_region(query_label, shared_class)
    prototype = masked_average_pooling(features, region)
    query_prototype = masked_average_pooling(query_features, query_region)
    forward = similarity_map(features, query_prototype, label.shape[-2:])
    backward = similarity_map(query_features, prototype, label.shape[-2:])
    loss = _mean_entropy(forward, region, label)
    loss = loss + _mean_entropy(backward, query_region, query_label)
    sharing = shared_class != IGNORE
    return (loss * sharing).sum() / (sharing.sum() if pairs is None else pairs).clamp_min(1)


def rectification_weight(region: Tensor, cisc_map: Tensor) -> Tensor:
    """Weigh each pixel by how far pseudo label and cross-image similarity agree (section 4).

    Args:
        region: (B, H, W) bool, where the pseudo label is the queried class.
        cisc_map: (B, H, W) in [0, 1], similarity to the queried labeled image.

    Returns:
        (B, H, W) in [0, 1]: 1 agrees, 0 clashes. Carries no gradient.
    """
    return 1.0 - (region.float() - cisc_map.detach()).abs()


def cross_image_weight(
    features: Tensor, prototype: Tensor, pseudo_label: Tensor, shared_class: Tensor
) -> Tensor:
    """Weigh the pixels of unlabeled images by the labeled images queried for them (section 4).

    Args:
        features: (B, D, h, w) float, the frozen teacher's, of the images.
        prototype: (B, D) float, the same teacher's, of the class in the queried images.
        pseudo_label: (B, H, W) long, of the images, 255 = ignored.
        shared_class: (B,) long, the class id a pair shares, 255 if none.

    Returns:
        (B, H, W) float in [0, 1], 1 everywhere in images that share no class. No gradient.
    """
    cisc_map = similarity_map(features, prototype, pseudo_label.shape[-2:])
    weight = rectification_weight(class_region(pseudo_label, shared_class), cisc_map)
    return torch.where((shared_class != IGNORE)[:, None, None], weight, torch.ones_like(weight))


def class_region(label: Tensor, shared_class: Tensor) -> Tensor:
    """Tell where (B, H, W) labels are the class of their image, of (B,): bool, False for 255."""
    return (label == shared_class[:, None, None]) & (label != IGNORE)


def class_prototypes(features: Tensor, label: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Average the features of every class of every image (section 7, before its mean).

    Args:
        features: (B, D, h, w) float.
        label: (B, H, W) long in [0, C), or 255 = ignored.
        num_classes: C.

    Returns:
        (B, C, D) float32 prototypes, zeros where the class is absent; (B, C) bool, class present.
    """
    area = _class_areas(label, num_classes)
    image, label_of = area.nonzero(as_tuple=True)
    regions = (label[image] == label_of[:, None, None]).to(at_least_float32(features))
    pulled = regions.new_zeros(*area.shape, *features.shape[-2:])
    pulled[image, label_of] = pull_back(regions, features.shape[-2:])
    with full_precision(features):
        sums = torch.einsum("bdhw,bchw->bcd", features.to(pulled.dtype), pulled)
    return sums / (area + _AREA_EPS).unsqueeze(2), area > 0


def reliability(features: Tensor, label: Tensor, anchors: Tensor) -> Tensor:
    """Score how well an image's classes agree with the class anchors (section 8).

    Args:
        features: (B, D, h, w) float.
        label: (B, H, W) long, true or pseudo, 255 = ignored.
        anchors: (C, D) float, the mean prototype of each class; NaN for a class that has none.

    Returns:
        (B, C) float32 <= 0, higher is more reliable, unlike in the paper: minus the binary cross
        entropy between the similarity map to the anchor and the class region, averaged over valid
        pixels. NaN where the image does not show the class or the class has no anchor.
    """
    cosines, known = _anchor_cosines(features, anchors)
    image, shown = (_class_areas(label, len(anchors)).bool() & known).nonzero(as_tuple=True)
    # One channel for each class that an image shows, not one for each that there is.
    maps = resize(cosines[image, shown].unsqueeze(1), label.shape[-2:]).squeeze(1)
    label = label[image]
    scores = cosines.new_full(cosines.shape[:2], torch.nan)
    scores[image, shown] = -_mean_entropy(maps, label == shown[:, None, None], label)
    return scores


def image_reliability(scores: Tensor, average: bool) -> Tensor:
    """Score images over the classes that they show (section 8).

    Args:
        scores: (B, C) float from ``reliability``, NaN where a class does not count.
        average: take the mean over classes; the sum, the paper's, favours images with few.

    Returns:
        (B,) float, higher is more reliable; -inf for an image in which no class counts.
    """
    score = scores.nanmean(dim=1) if average else scores.nansum(dim=1)
    return score.masked_fill(scores.isnan().all(dim=1), -torch.inf)


def _anchor_cosines(features: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of every place with (C, D) anchors, (B, C, h, w); (C,) bool, which are known."""
    cosines = _cosines(features, anchors.nan_to_num().expand(len(features), -1, -1))
    return cosines, ~anchors.isnan().any(dim=1)


def _cosines(features: Tensor, prototypes: Tensor) -> Tensor:
    """Cosines of every place with (B, C, D) prototypes, clamped to [0, 1]: (B, C, h, w)."""
    dtype = at_least_float32(features)
    with full_precision(features):
        features = features.to(dtype)
        directions = F.normalize(prototypes.to(dtype), dim=2, eps=_NORM_EPS)
        along = torch.einsum("bdhw,bcd->bchw", features, directions)
        lengths = torch.linalg.vector_norm(features, dim=1, keepdim=True)
        return (along / lengths.clamp_min(_NORM_EPS)).clamp(0.0, 1.0)


def _class_areas(label: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of every class: (B, C) long."""
    areas = [(label == class_id).sum(dim=(1, 2)) for class_id in range(num_classes)]
    return torch.stack(areas, dim=1)


def _mean_entropy(probability: Tensor, region: Tensor, label: Tensor) -> Tensor:
    """Binary cross entropy averaged over the valid pixels of each map: (..., H, W) to (...)."""
    bounded = probability.clamp(_PROBABILITY_EPS, 1.0 - _PROBABILITY_EPS)
    with full_precision(probability):
        # torch's binary_cross_entropy asserts where a probability is NaN; this loss becomes NaN.
        loss = -torch.where(region, bounded.log(), (-bounded).log1p())
    valid = (label != IGNORE).to(loss.dtype)
    return (loss * valid).sum(dim=(-2, -1)) / valid.sum(dim=(-2, -1)).clamp_min(1)
