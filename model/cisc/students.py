"""What a student learns from: labels, weights, thresholds and mixed views (section 4).

Retraining (stages 4 and 6) reads unlabeled images with their stored pseudo labels. ``Labeler``
says which label each pixel has and how much it counts: the stored label, or that of the running
average of the student, which stored votes may correct; weight 1, or agreement with the CISC map of
a labeled partner (the paper); 0 where the probability of the label is below ``retrain.threshold``.
``student_batch`` adds the labeled images and mixes the strongly coloured views. ``train.py`` turns
the result into a loss.

To change what a student is told about unlabeled images, this is the file.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dataset.training import RetrainSample, parts
from model.cisc.calibration import Exponents
from model.cisc.maps import (
    class_region,
    cross_image_weight,
    masked_average_pooling,
    similarity_map,
)
from model.cisc.pseudo_labels import combine
from model.ops.bilinear import resize
from model.ops.layers import full_size
from utils import IGNORE
from utils.config.schema import RetrainSection
from utils.distributed import all_reduce_sum


class StudentBatch(NamedTuple):
    """What a student passes and learns from in an iteration: K labeled images, V views."""

    labeled_image: Tensor  # (B, K, 3, H, W) float, normalised
    labeled_label: Tensor  # (B, K, H, W) long, true, 255 = ignored
    view_image: Tensor  # (B, V, 3, H, W) float, normalised: of unlabeled images
    view_label: Tensor  # (B, V, H, W) long, 255 = ignored
    view_weight: Tensor  # (B, V, H, W) float in [0, 1]


class MixedView(NamedTuple):
    """Unlabeled images as the student sees them, and what it should learn from them."""

    image: Tensor  # (B, 3, H, W) float, normalised
    label: Tensor  # (B, H, W) long, 255 = ignored
    weight: Tensor  # (B, H, W) float in [0, 1]


def student_batch(samples: RetrainSample, labeler: "Labeler") -> StudentBatch:
    """Label, weigh and mix the unlabeled images of a batch.

    Args:
        samples: the batch, with the stored pseudo labels.
        labeler: labels and weighs; its settings say the rest. ``mix`` is applied to each of the
            ``views`` in strong colours; with ``feature_dropout`` the weak view comes last, unmixed;
            with ``learn_partners`` the partners are labeled images too. Networks see ``accumulate``
            parts in turn.
    """
    settings = labeler.settings
    columns = zip(*map(labeler, parts(samples, settings.accumulate)), strict=True)
    label, weight = (torch.cat(column) for column in columns)
    labeled = [(samples.labeled_image, samples.labeled_label)]
    if settings.learn_partners:
        labeled.append((samples.partner.image, samples.partner.label))
    mix = MIXES[settings.mix]
    views = [mix(MixedView(image, label, weight)) for image in samples.student_image.unbind(1)]
    if settings.feature_dropout:
        views.append(MixedView(samples.image, label, weight))
    images, labels = (torch.stack(column, dim=1) for column in zip(*labeled, strict=True))
    mixed = MixedView(*(torch.stack(column, dim=1) for column in zip(*views, strict=True)))
    return StudentBatch(images, labels, *mixed)


@dataclass(frozen=True)
class Labeler:
    """Labels the pixels of unlabeled images and weighs them, as ``retrain.*`` says.

    Attributes:
        settings: labels, weight, threshold.
        teacher: frozen; None where neither weights nor threshold ask it (``needs_teacher``).
        average: running average of the student, which labels instead; None: stored labels.
        exponents: of the running average and of the samples' votes; None: they have none.
    """

    settings: RetrainSection
    teacher: nn.Module | None = None
    average: nn.Module | None = None
    exponents: Exponents | None = None

    def __call__(self, samples: RetrainSample) -> tuple[Tensor, Tensor]:
        """Return labels (B, H, W) long, 255 = ignored, and weights (B, H, W) float in [0, 1]."""
        label, probability = samples.pseudo_label, None
        features = None if self.teacher is None else self.teacher.extract(samples.image)
        if self.average is not None:
            label, probability = predict_labels(self.average, samples, self.exponents)
        elif self.settings.threshold:
            probability = label_probability(self.teacher, features, label)
        weight = torch.ones_like(label, dtype=torch.float32)
        if self.settings.weight == "cisc_map":
            weight = self._agreement(features, samples)
        if self.settings.threshold:
            weight = weight * (probability >= self.settings.threshold)
        return label, weight

    @property
    def images_passed(self) -> int:
        """Images that pass the teacher and the running average for each unlabeled one."""
        partners = self.settings.weight == "cisc_map"
        return (self.teacher is not None) + partners + (self.average is not None)

    def cisc_map(self, samples: RetrainSample) -> Tensor:
        """Return where images look like their partners' shared class: (B, H, W) in [0, 1]."""
        features, size = self.teacher.extract(samples.image), samples.pseudo_label.shape[-2:]
        return similarity_map(features, self._partner_prototype(samples), size)

    def _agreement(self, features: Tensor, samples: RetrainSample) -> Tensor:
        shared, label = samples.partner.shared_class, samples.pseudo_label
        return cross_image_weight(features, self._partner_prototype(samples), label, shared)

    def _partner_prototype(self, samples: RetrainSample) -> Tensor:
        partner = samples.partner
        region = class_region(partner.label, partner.shared_class)
        return masked_average_pooling(self.teacher.extract(partner.image), region)


def needs_teacher(settings: RetrainSection) -> bool:
    """Tell whether labels or weights of retraining ask the frozen teacher."""
    thresholded = settings.threshold > 0 and settings.labels == "stored"
    return settings.weight == "cisc_map" or thresholded


def predict_labels(
    average: nn.Module, samples: RetrainSample, exponents: Exponents | None
) -> tuple[Tensor, Tensor]:
    """Label weak views by the running average, and by the samples' votes where there are exponents.

    Returns:
        (B, H, W) long, and the labels' probabilities. Pixels that a stored label ignores stay
        ignored; with votes, which decide anew, those that are padding alone.

    Source: mean teacher (Tarvainen and Valpola, NeurIPS 2017), FixMatch (Sohn et al., NeurIPS
    2020); votes: docs/method.md, section 10.
    """
    average.eval()
    probability, kept = average(samples.image).logits.softmax(dim=1), samples.pseudo_label != IGNORE
    if exponents is not None:
        ratio, kept = samples.votes
        ratio = resize(ratio.float(), tuple(kept.shape[-2:]), align_corners=True)
        probability = combine(probability.float().clamp_min(1e-6).log(), ratio, exponents)
    probability, ids = probability.max(dim=1)
    return ids.where(kept, IGNORE), probability


def label_probability(teacher: nn.Module, features: Tensor, label: Tensor) -> Tensor:
    """Return the teacher's probability of stored (B, H, W) labels; 0 where they are ignored."""
    probability = full_size(teacher.classify(features), label).softmax(dim=1)
    valid = label != IGNORE
    return probability.gather(1, label.where(valid, 0).unsqueeze(1)).squeeze(1) * valid


class ClassPixels(nn.Module):
    """Counts the pixels of each class that a training stage learns from.

    Their weighted shares are the prior that the trained network's probabilities hold, which
    ``pseudo_labels.py`` divides out. ``pixels`` and ``pseudo_pixels`` are (C,) int64, over all
    processes; a resumed stage goes on counting.

    Args:
        num_classes: C.
        class_weights: (C,) float of the loss of true labels; None: 1.
    """

    def __init__(self, num_classes: int, class_weights: Tensor | None = None) -> None:
        super().__init__()
        self._class_weights = class_weights
        self.register_buffer("pixels", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("pseudo_pixels", torch.zeros(num_classes, dtype=torch.int64))

    def count(self, *labels: Tensor) -> None:
        """Add integer tensors of class ids, 255 = ignored. Collective."""
        self.pixels += self._in_each_class(labels)

    def count_pseudo(self, label: Tensor) -> None:
        """Add a tensor of pseudo labels, 255 = ignored, which no weights multiply. Collective."""
        self.pseudo_pixels += self._in_each_class([label])

    def _in_each_class(self, labels: Sequence[Tensor]) -> Tensor:
        classes = len(self.pixels)
        # 255 is counted beyond the classes: cutting it out would wait for the device.
        places = torch.cat([label.where(label != IGNORE, classes).flatten() for label in labels])
        return all_reduce_sum(torch.bincount(places, minlength=classes + 1)[:classes])

    def learnt(self) -> list[float]:
        """Return the pixels of each class, those of true labels multiplied by its weight."""
        weights = [1] * len(self.pixels)
        if self._class_weights is not None:
            weights = self._class_weights.tolist()
        counts = zip(self.pixels.tolist(), weights, self.pseudo_pixels.tolist(), strict=True)
        return [true * weight + pseudo for true, weight, pseudo in counts]


def random_boxes(like: Tensor) -> Tensor:
    """Draw a box for each of (B, H, W) maps: bool, True inside, on their device.

    With probability 1/2 it has an area of U(0.02, 0.4) of the map and an aspect ratio of
    U(0.3, 1 / 0.3), cut at the edges; else it is empty. Random numbers are torch's, of the CPU.

    Source: the box as UniMatch (Yang et al., CVPR 2023) describes it.
    """
    height, width = like.shape[-2:]
    boxes = torch.zeros(like.shape, dtype=torch.bool)
    for box in boxes:
        chance, share, ratio, y, x = torch.rand(5).tolist()
        area, aspect = (0.02 + 0.38 * share) * height * width, 0.3 + (1 / 0.3 - 0.3) * ratio
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        top, left = int(y * max(1, height - rows)), int(x * max(1, width - columns))
        box[top : top + rows, left : left + columns] = chance < 0.5
    return boxes.to(like.device)


def keep_whole(view: MixedView) -> MixedView:
    """Return the view as it is."""
    return view


def cut_out(view: MixedView) -> MixedView:
    """Blank a random box of each image: mean colour, ignored label (DeVries and Taylor, 2017)."""
    blank = MixedView(torch.zeros(()), torch.tensor(IGNORE), torch.zeros(()))
    return _paste(view, MixedView(*(value.to(view.image.device) for value in blank)))


def cut_mix(view: MixedView) -> MixedView:
    """Paste a random box of each image into the one before it (Yun et al., ICCV 2019)."""
    return _paste(view, MixedView(*(value.roll(-1, dims=0) for value in view)))


def _paste(view: MixedView, other: MixedView) -> MixedView:
    boxes = random_boxes(view.label)
    image = torch.where(boxes.unsqueeze(1), other.image, view.image)
    label = torch.where(boxes, other.label, view.label)
    return MixedView(image, label, torch.where(boxes, other.weight, view.weight))


# What the student's views of unlabeled images are mixed with, by the name in ``retrain.mix``.
MIXES: dict[str, Callable[[MixedView], MixedView]] = {
    "none": keep_whole,
    "cutout": cut_out,
    "unlabeled": cut_mix,
}
