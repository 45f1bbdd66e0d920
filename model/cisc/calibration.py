"""How far votes are trusted beside the teacher: fitted on labeled images that neither saw.

Teachers of shorter stages, each trained without a fold of the labeled images, judge that fold, and
patches of the other folds vote on it. ``fit_exponents`` finds with which powers both explain the
labels best. Votes that do not help are silent.

To change when votes are believed, this is the file.

Source: ours; docs/method.md, section 10. A logarithmic opinion pool with fitted weights (Genest and
Zidek, Statistical Science 1986); fitting on what was held out is stacking (Wolpert, 1992).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dataset.lists import Sample
from dataset.loader import RandomStreams
from utils.evaluation import ConfusionMatrix
from utils.scores import group_of

FOLDS = 2  # of the labeled images
FOLD_LENGTH = 0.25  # of stage 1, the training of a teacher that leaves a fold out
STEPS = 50  # of Newton's method, at most
_SURE = 2.0  # standard errors by which votes have to lower the cross entropy


class HeldOut(NamedTuple):
    """Pixels of labeled images that neither the teacher nor the votes had seen."""

    teacher: Tensor  # (N, C) float: log probabilities, with the prior of the labels
    votes: Tensor  # (N, C) float: log likelihood ratios
    alone: Tensor  # (N,) long in [0, C): the teacher's label, which is taken where votes are silent
    label: Tensor  # (N,) long in [0, C)
    image: Tensor  # (N,) long: a number of the image, or of the group, that they are of


class Exponents(NamedTuple):
    """Powers of the two opinions in a pseudo label."""

    teacher: float = 1.0  # of the probability
    votes: float = 0.0  # of the likelihood ratio; 0: votes are silent


class Fit(NamedTuple):
    """What votes add to a teacher on pixels that both had not seen."""

    exponents: Exponents  # with the least cross entropy; neither is negative
    cross_entropy: float  # nats a pixel, with these exponents
    cross_entropy_alone: float  # the same, of the teacher alone with a fitted exponent
    gain: float  # mean over images of what votes take from the cross entropy
    error: float  # standard error of the gain; of one image as large as the gain
    miou: float  # in [0, 1], of the most probable classes of both
    miou_alone: float  # of the teacher's own labels

    @property
    def helps(self) -> bool:
        """Whether labels are better with votes, beyond chance."""
        return self.gain > _SURE * self.error and self.miou > self.miou_alone

    def report(self) -> dict[str, float]:
        """Return all numbers by name."""
        numbers = self._asdict()
        return {**numbers.pop("exponents")._asdict(), **numbers}


def draw_folds(
    labeled: Sequence[Sample], groups: str | None, chance: RandomStreams
) -> list[list[Sample]]:
    """Cut labeled images at random into folds of about one size; a group is in one fold.

    Args:
        labeled: the images.
        groups: expression that finds an image's group in its name, such as a volume's slices;
            None: every image is a group.
        chance: draws.

    Returns:
        ``FOLDS`` lists in the order of ``labeled``; none if there are fewer groups.
    """
    names = [group_of(sample.name, groups) for sample in labeled]
    different = sorted(set(names))
    if len(different) < FOLDS:
        return []
    order = [different[place] for place in chance.of().permutation(len(different))]
    folds: list[set[str]] = [set() for _ in range(FOLDS)]
    for name in order:  # the smallest fold takes the next group
        sizes = [sum(other in fold for other in names) for fold in folds]
        folds[sizes.index(min(sizes))].add(name)
    return [[s for s, name in zip(labeled, names, strict=True) if name in fold] for fold in folds]


def fit_exponents(pixels: HeldOut) -> Fit:
    """Fit the powers of teacher and votes to labels, by cross entropy.

    Args:
        pixels: of labeled images, one or more.

    Returns:
        The minimum of the mean of -log softmax(a log p + b log ratio)[label] over a, b >= 0, which
        is convex in both.
    """
    scores, label = torch.stack([pixels.teacher, pixels.votes]).double(), pixels.label
    alone = torch.cat([_minimum(scores[:1], label), scores.new_zeros(1)])
    both = _minimum(scores, label)
    if both[1] < 0:
        both = alone
    elif both[0] < 0:
        both = torch.cat([scores.new_zeros(1), _minimum(scores[1:], label)])
    alone_loss, loss = (_losses(scores, label, powers) for powers in (alone, both))
    gains = _means(alone_loss - loss, pixels.image)
    return Fit(
        Exponents(*both.tolist()),
        loss.mean().item(),
        alone_loss.mean().item(),
        gains.mean().item(),
        (gains.std() / len(gains) ** 0.5 if len(gains) > 1 else gains.abs().mean()).item(),
        *(_mean_iou(x, label) for x in (_pool(scores, both).argmax(dim=1), pixels.alone)),
    )


def fit_learnt(first: Tensor, votes: Tensor, later: Tensor) -> float:
    """Fit how much of the votes the teacher of a later stage has learnt.

    Args:
        first: (N, C) float: log probabilities of the teacher that made labels together with votes.
        votes: (N, C) float: log likelihood ratios.
        later: (N, C) float: log probabilities of a teacher that learnt those labels.

    Returns:
        c >= 0, the votes' exponent with which ``a first + c votes`` explains the later teacher's
        probabilities best, by cross entropy over a and c.
    """
    scores = torch.stack([first, votes]).double()
    return max(0.0, _minimum(scores, later.double().softmax(dim=1))[1].item())


def _pool(scores: Tensor, powers: Tensor) -> Tensor:
    return torch.einsum("k,knc->nc", powers, scores)


def _losses(scores: Tensor, target: Tensor, powers: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(_pool(scores, powers), target, reduction="none")


def _minimum(scores: Tensor, target: Tensor) -> Tensor:
    """Minimise the mean cross entropy over the powers of (K, N, C) scores, by Newton's method.

    The target is (N,) class ids, or (N, C) probabilities.
    """
    powers = scores.new_full((len(scores),), 1 / len(scores))
    if target.dim() == 2:
        own = (scores * target).sum(dim=2)
    else:
        own = scores.gather(2, target.view(1, -1, 1).expand(len(scores), -1, 1)).squeeze(2)
    loss = _losses(scores, target, powers).mean()
    for _ in range(STEPS):
        probability = _pool(scores, powers).softmax(dim=1)
        mean = torch.einsum("nc,knc->kn", probability, scores)
        gradient = (mean - own).mean(dim=1)
        second = torch.einsum("nc,knc,lnc->kl", probability, scores, scores) / len(target)
        curvature = second - mean @ mean.T / len(target)
        curvature += 1e-9 * torch.eye(len(scores), dtype=scores.dtype)
        step = torch.linalg.solve(curvature, gradient)
        lower = _losses(scores, target, powers - step).mean()
        while lower > loss and step.norm() > 1e-9:
            step = step / 2
            lower = _losses(scores, target, powers - step).mean()
        if loss - lower < 1e-12:
            break
        powers, loss = powers - step, lower
    return powers


def _means(values: Tensor, group: Tensor) -> Tensor:
    """Return the mean of (N,) values in each group: (groups,)."""
    _, place = group.unique(return_inverse=True)
    return torch.bincount(place, values) / torch.bincount(place)


def _mean_iou(predicted: Tensor, label: Tensor) -> float:
    matrix = ConfusionMatrix(int(label.max().maximum(predicted.max())) + 1)
    matrix.update(predicted[None], label[None])
    return matrix.mean_iou()
