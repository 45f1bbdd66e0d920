"""What training steps go down: the losses of stage 1 and of stages 4 and 6."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dataset.training import QueriedImage, QueriedPrototype, QueryPair, RetrainSample
from model.cisc import (
    class_region,
    consistency_loss,
    cross_image_weight,
    masked_average_pooling,
)
from model.losses import cross_entropy, ohem_cross_entropy, rectified_cross_entropy
from utils import IGNORE
from utils.config.schema import OhemSection
from utils.distributed import total

LabeledLoss = Callable[..., Tensor]  # of logits, true labels, and ``batch_label``
Guide = Callable[[RetrainSample], Tensor]  # weighs the pixels of pseudo labels


class Loss(NamedTuple):
    """A scalar to go down, and the scalars to show: its terms, and what else tells how it goes.

    Of several processes, and of a batch that passes in parts, each has its part; they add up.
    """

    total: Tensor
    shown: dict[str, Tensor]


def labeled_loss_of(ohem: OhemSection | None) -> LabeledLoss:
    """Return what labeled images go down: cross entropy, of hard pixels alone if a config asks."""
    if ohem is None:
        return cross_entropy
    return partial(ohem_cross_entropy, **ohem.model_dump())


def supervised_loss(
    net: nn.Module,
    labeled_loss: LabeledLoss,
    consistency: float,
    pair: QueryPair,
    batch: QueryPair | None = None,
) -> Loss:
    """Cross entropy of both images of each pair, and how well they find each other's class.

    Args:
        net: the student; both images pass it as one batch.
        labeled_loss: cross entropy of logits and true labels.
        consistency: weight of the consistency loss; 0 leaves it out.
        pair: a batch of pairs, or a part of one.
        batch: all of it; None if ``pair`` is.

    Source: METHOD stage 1, and piece 3.
    """
    batch = batch or pair
    output = net(torch.cat([pair.image, pair.query_image]))
    logits, query_logits = output.logits.chunk(2)
    features, query_features = output.features.chunk(2)
    entropy = labeled_loss(logits, pair.label, batch_label=batch.label)
    entropy = entropy + labeled_loss(query_logits, pair.query_label, batch_label=batch.query_label)
    if consistency == 0:
        return Loss(entropy, {"ce": entropy})
    consistent = consistency_loss(
        features,
        query_features,
        pair.label,
        pair.query_label,
        pair.shared_class,
        batch.shared_class,
    )
    total = entropy + consistency * consistent
    return Loss(total, {"ce": entropy, "consistency": consistent})


def retrain_loss(
    net: nn.Module,
    guide: Guide | None,
    labeled_loss: LabeledLoss,
    samples: RetrainSample,
    batch: RetrainSample | None = None,
) -> Loss:
    """Rectified cross entropy of unlabeled images, and cross entropy of labeled ones.

    Args:
        net: the student; both kinds of images pass it as one batch.
        guide: weighs the pixels of pseudo labels; None weighs all of them 1.
        labeled_loss: cross entropy of logits and true labels.
        samples: a batch of samples, or a part of one.
        batch: all of it; None if ``samples`` is.

    Source: METHOD stages 4 and 6, and piece 4.
    """
    batch = batch or samples
    label, pseudo_label = samples.labeled_label, samples.pseudo_label
    weight = torch.ones_like(pseudo_label, dtype=torch.float32)
    if guide is not None:
        with torch.no_grad():
            weight = guide(samples)
    logits = net(torch.cat([samples.student_image, samples.labeled_image])).logits
    student_logits, labeled_logits = logits.chunk(2)
    unlabeled = rectified_cross_entropy(student_logits, pseudo_label, weight, batch.pseudo_label)
    labeled = labeled_loss(labeled_logits, label, batch_label=batch.labeled_label)
    valid, everyone = batch.pseudo_label != IGNORE, batch.queried.shared_class
    shown = {
        "unlabeled": unlabeled,
        "labeled": labeled,
        "weight": (weight * (pseudo_label != IGNORE)).sum() / total(valid.sum()).clamp_min(1),
        "queried": (samples.queried.shared_class != IGNORE).sum()
        / total(torch.ones_like(everyone).sum()),
    }
    return Loss(unlabeled + labeled, shown)


def weight_by_image(teacher: nn.Module, batch: RetrainSample) -> Tensor:
    """Weigh pseudo labels by the queried images, which pass the teacher with them.

    Args:
        teacher: frozen.
        batch: its ``queried`` are ``QueriedImage``.

    Returns:
        (B, H, W) float32 in [0, 1].
    """
    queried: QueriedImage = batch.queried
    features = teacher.extract(torch.cat([batch.image, queried.image]))
    features, query_features = features.chunk(2)
    region = class_region(queried.label, queried.shared_class)
    prototype = masked_average_pooling(query_features, region)
    return cross_image_weight(features, prototype, batch.pseudo_label, queried.shared_class)


def weight_by_bank(teacher: nn.Module, bank: Tensor, batch: RetrainSample) -> Tensor:
    """Weigh pseudo labels by prototypes of whole labeled images, computed before.

    Args:
        teacher: frozen.
        bank: (labeled images, C, D) float32, the teacher's prototypes.
        batch: its ``queried`` are ``QueriedPrototype``.

    Returns:
        (B, H, W) float32 in [0, 1].
    """
    queried: QueriedPrototype = batch.queried
    some_class = queried.shared_class.clamp_max(bank.shape[1] - 1)  # of 255 no weight comes
    prototype = bank[queried.position, some_class]
    features = teacher.extract(batch.image)
    return cross_image_weight(features, prototype, batch.pseudo_label, queried.shared_class)
