"""Pseudo labels of whole images: a teacher's, corrected by votes of labeled patches (section 10).

``fit_votes`` is the stage that finds out how far votes are to be believed, ``PseudoLabeler`` what
stages 2 and 5 label with, ``combine`` the rule.

To change how pseudo labels are made, this is the file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dataset.lists import Sample
from dataset.loader import RandomStreams, whole_images
from model.cisc.calibration import Exponents, Fit, HeldOut, fit_exponents, fit_learnt
from model.cisc.votes import PatchVoter, as_prior, cut_patches
from model.losses import balanced_weights
from model.networks import load_frozen
from utils import IGNORE
from utils.checkpoint import load
from utils.config.schema import Config, LossSection
from utils.device import Device
from utils.diagnosis import describe_votes
from utils.distributed import gather_list, on_rank_zero
from utils.evaluation import Predictor, iterate_batches
from utils.files import write_json
from utils.run.folder import VOTES_FILE, read_votes
from utils.run.stages import Report, Stage, checkpoint_of
from utils.scores import group_of

_PIXELS = 4000  # of each image, by which exponents are fitted
_UNLABELED = 64  # images at most, evenly spaced, that tell what a teacher has learnt of the votes
# Where they cannot be fitted. Bayes' rule, 1 and 1, counts twice what both know; the votes' fitted
# exponents were 0.3 to 1 of the teacher's (docs/rectifier.md).
_UNFITTED = Exponents(teacher=1.0, votes=0.5)


class FoldTeacher(NamedTuple):
    """A teacher that has not seen a fold of the labeled images."""

    folder: Path  # of its training stage
    fold: Sequence[Sample]


@torch.inference_mode()
def fit_votes(stage: Stage, labeled: Sequence[Sample], teachers: Sequence[FoldTeacher]) -> Report:
    """Fit how far votes are believed beside a teacher, and write ``votes.json``.

    Args:
        stage: where it works.
        labeled: all labeled images.
        teachers: one a fold; none: there are too few images to leave some out, and votes count
            half.

    Returns:
        The factor by which images are enlarged, the exponents of teacher and votes, and what both
        make of the images left out.

    Raises:
        UserError: no patch is labeled on more than half of its pixels.
    """
    config = stage.config
    voters = cut_patches(config, stage.device, labeled, config.pseudo_label.neighbour_scales)
    batches = [batch for one in teachers for batch in _judge_fold(stage, voters, one)]
    fitted = {"factor": voters[0].factor, **_UNFITTED._asdict()}
    if sum(len(batch.label) for batch in batches):
        pixels = _concatenate(batches)
        votes = pixels.votes.unbind(1)
        fits = {
            v.factor: fit_exponents(pixels._replace(votes=x))
            for v, x in zip(voters, votes, strict=True)
        }
        fitted = _choose(fits)
    on_rank_zero(write_json)(stage.folder / VOTES_FILE, fitted)
    stage.log.say(f"{stage.name}: {describe_votes(fitted)}")
    return fitted


def _choose(fits: Mapping[float, Fit]) -> dict[str, Any]:
    """Choose the smallest factor that gains as much as the best one, within a standard error.

    An image enlarged three times takes nine times as long. Votes that do not help get exponent 0.
    """
    most = max(fits.values(), key=lambda fit: fit.gain)
    enough = [factor for factor, fit in fits.items() if fit.gain >= most.gain - most.error]
    factor, best = min(enough), fits[min(enough)]
    used = best.exponents if best.helps else Exponents()
    return {"factor": factor, **used._asdict(), "fit": best.report()}


def _judge_fold(stage: Stage, voters: Sequence[PatchVoter], teacher: FoldTeacher) -> list[HeldOut]:
    """Let a teacher, and the patches of other folds, judge pixels of its fold's images. Collective.

    Returns:
        Pixels of each batch of images, on the CPU; ``votes`` is (N, voters, C).
    """
    config, device = stage.config, stage.device
    others = [voter.without(teacher.fold) for voter in voters]
    if any(voter.is_empty for voter in others):
        return []
    others = [voter.project() for voter in others]
    judge = Teacher(config, device, checkpoint_of(teacher.folder))
    labeled = voters[0].labeled
    judged = [sample for sample in labeled if sample in teacher.fold]
    groups = [group_of(sample.name, config.dataset.groups) for sample in labeled]
    streams, batches = RandomStreams(config.seed, teacher.folder.name), []
    loader = whole_images(config, judged, judge.net.preprocessing)
    prior = prior_of_labels(others[0].shares, config.loss)  # of images that the teacher has seen
    for batch in iterate_batches(loader, device, stage.name):
        size = tuple(batch.label.shape[-2:])
        probability = judge(batch.image, size)
        opinion = judge.log_posterior(probability, prior)
        told = [voter.judge(batch.image, size).log_ratio for voter in others]
        maps = opinion, torch.stack(told, dim=1), probability.argmax(dim=1), batch.label
        images = []
        for index, *image in zip(batch.index.tolist(), *maps, strict=True):
            group = groups.index(group_of(judged[index].name, config.dataset.groups))
            images.append(_draw_pixels(image, group, streams.of(index)))
        batches.append(_concatenate(images))
    return gather_list(batches)


def _draw_pixels(maps: Sequence[Tensor], group: int, rng: np.random.Generator) -> HeldOut:
    """Draw labeled pixels of (..., H, W) maps, the last an image's label: (N, ...) on the CPU."""
    rows = [one.flatten(-2).cpu() for one in maps]
    known = (rows[-1] != IGNORE).nonzero().flatten().numpy()
    chosen = torch.from_numpy(rng.permutation(known)[:_PIXELS])
    return HeldOut(
        *(one[..., chosen].movedim(-1, 0) for one in rows), torch.full_like(chosen, group)
    )


def _concatenate(parts: Sequence[HeldOut]) -> HeldOut:
    return HeldOut(*map(torch.cat, zip(*parts, strict=True)))


@torch.inference_mode()
def discount_votes(
    stage: Stage,
    labeled: Sequence[Sample],
    unlabeled: Sequence[Sample],
    votes: Path,
    teachers: tuple[Path, Path],
) -> Report:
    """Take from the votes what a later teacher has learnt of them, and write ``votes.json``.

    A student of labels that votes have corrected repeats the votes; beside it they would count
    twice.

    Args:
        stage: where it works.
        labeled: images that vote.
        unlabeled: images to be labeled.
        votes: folder of ``fit_votes``.
        teachers: folders of the teacher that votes were fitted for, and of the later one.

    Returns:
        What ``fit_votes`` returned, with the exponent of the votes that is left, and ``learnt``;
        unchanged where votes are silent or no image is to be labeled.

    Raises:
        UserError: ``votes.json`` is missing or damaged.

    Source: ours; docs/method.md, section 10.
    """
    config, device, fitted = stage.config, stage.device, read_votes(votes)
    if fitted["votes"] and unlabeled:
        (voter,) = cut_patches(config, device, labeled, [fitted["factor"]])
        voter, prior = voter.project(), prior_of_labels(voter.shares, config.loss)
        both = [Teacher(config, device, checkpoint_of(folder)) for folder in teachers]
        shown = unlabeled[:: -(-len(unlabeled) // _UNLABELED)]
        loader = whole_images(config, shown, both[0].net.preprocessing)
        streams, pixels = RandomStreams(config.seed, stage.name), []
        for batch in iterate_batches(loader, device, stage.name):
            size = tuple(batch.label.shape[-2:])
            maps = [one.log_posterior(one(batch.image, size), prior) for one in both]
            maps.append(voter.judge(batch.image, size).log_ratio)
            drawn = []
            for index, *image in zip(batch.index.tolist(), *maps, strict=True):
                chosen = streams.of(index).permutation(size[0] * size[1])[:_PIXELS]
                drawn.append(torch.stack([one.flatten(1)[:, chosen].T for one in image]))
            pixels.append(torch.cat(drawn, dim=1).cpu())
        first, later, ratio = torch.cat(gather_list(pixels), dim=1)
        learnt = fit_learnt(first, ratio, later)
        left = max(0.0, fitted["votes"] - fitted["teacher"] * learnt)
        stage.log.say(
            f"{stage.name}: the teacher has learnt {learnt:.2f} of the votes: "
            f"their exponent is {left:.2f}, no longer {fitted['votes']:.2f}"
        )
        fitted |= {"votes": left, "learnt": learnt}
    on_rank_zero(write_json)(stage.folder / VOTES_FILE, fitted)
    return fitted


class Teacher:
    """A frozen network that labels.

    Args:
        config: of the run.
        device: where it works.
        checkpoint: of the network.

    Attributes:
        net: the network.
        prior: (C,) positive float, sum 1, which its probabilities hold: the classes' shares of what
            it was trained on. None in checkpoints that do not say.
    """

    def __init__(self, config: Config, device: Device, checkpoint: Path) -> None:
        self.net = load_frozen(config, device, checkpoint)
        self._predict = Predictor(self.net, device, config.inference, config.pseudo_label)
        pixels = load(checkpoint).get("class_pixels")
        counts = None if pixels is None else torch.tensor(pixels, device=device.torch_device)
        self.prior = None if counts is None else as_prior(counts)

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Predict (B, 3, h, w) normalised images: (B, C, H, W) probabilities, sum 1 over C."""
        return self._predict(images, size)

    def log_posterior(self, probability: Tensor, prior: Tensor) -> Tensor:
        """Put the prior of the labels, (C,), in place of the network's: log, not normalised."""
        shift = 0.0 if self.prior is None else (prior / self.prior).log().view(-1, 1, 1)
        return probability.clamp_min(1e-6).log() + shift


def prior_of_labels(shares: Tensor, loss: LossSection) -> Tensor:
    """Return the prior of pseudo labels: the classes' shares of pixels, each times its loss weight.

    A loss with class weights asks for labels as if rare classes were as frequent as it weighs them.

    Args:
        shares: (C,) float, sum 1, of the labeled pixels.
        loss: its ``class_weights`` are used.

    Returns:
        (C,) float, 0.0001 at least, sum 1. Balanced: all classes with labels are alike.
    """
    weights = loss.class_weights
    if weights is None:
        return as_prior(shares)
    if weights == "balanced":
        weights = balanced_weights(shares.tolist())
    return as_prior(shares * shares.new_tensor(weights))


class Opinions(NamedTuple):
    """Class probabilities of unlabeled images, (B, C, H, W) float32, each sums to 1 over C."""

    teacher: Tensor
    votes: Tensor | None  # None without votes
    both: Tensor  # what pseudo labels are the most probable class of
    features: Tensor  # (B, D) float: of the voter, or without votes the classes' mean probabilities
    by_patch: Tensor | None = None  # (B, C, h, w) float, log ratios of the votes; None without


def combine(log_posterior: Tensor, log_ratio: Tensor, exponents: Exponents) -> Tensor:
    """Combine a teacher's opinion with what votes add to it.

    Args:
        log_posterior: (B, C, H, W) float: logarithms of the teacher's probabilities.
        log_ratio: the same shape: the votes' log likelihood ratios; 0 where they tell nothing.
        exponents: of both. (1, 1) is Bayes' rule for opinions that are independent given the class.

    Returns:
        (B, C, H, W) float32, sums to 1 over C.

    Source: docs/method.md, section 10.
    """
    return (exponents.teacher * log_posterior + exponents.votes * log_ratio).softmax(dim=1)


def read_exponents(votes: Path | None) -> Exponents | None:
    """Read from the folder of ``fit_votes`` how far votes are believed.

    Returns:
        None if there is no folder, or votes do not help.

    Raises:
        UserError: ``votes.json`` is missing or damaged.
    """
    fitted = {"votes": 0} if votes is None else read_votes(votes)
    return Exponents(fitted["teacher"], fitted["votes"]) if fitted["votes"] else None


def adjust(probability: Tensor, prior: Tensor, share: float) -> Tensor:
    """Divide probabilities by a prior to a power, for rare classes.

    Args:
        probability: (B, C, H, W) float, sums to 1 over C.
        prior: (C,) positive float, sum 1, that they hold.
        share: the power. 0: as they are; 1: all classes are equally probable without evidence.

    Returns:
        As ``probability``, normalised again.

    Source: logit adjustment (Menon et al., ICLR 2021, section 4.1).
    """
    if share == 0:
        return probability
    return (probability.clamp_min(1e-12).log() - share * prior.log().view(-1, 1, 1)).softmax(dim=1)


class PseudoLabeler:
    """Makes pseudo labels of whole images: by the teacher, and by votes where they help.

    Args:
        config: of the run.
        device: where both work.
        checkpoint: the teacher's.
        labeled: images that vote.
        votes: folder of the stage that fitted how far votes are believed; None: no votes.

    Attributes:
        config: the same.
        voter: None without votes, and where they do not help.

    Raises:
        UserError: ``votes.json`` is missing or damaged; a checkpoint of another network.
    """

    def __init__(
        self,
        config: Config,
        device: Device,
        checkpoint: Path,
        labeled: Sequence[Sample],
        votes: Path | None,
    ) -> None:
        self.config, self._teacher, self.voter = config, Teacher(config, device, checkpoint), None
        fitted = None if votes is None else read_votes(votes)
        if fitted is not None and fitted["votes"]:
            self._exponents = Exponents(fitted["teacher"], fitted["votes"])
            (voter,) = cut_patches(config, device, labeled, [fitted["factor"]])
            self.voter = voter.project()

    @property
    def teacher(self) -> nn.Module:
        """The network that labels, frozen."""
        return self._teacher.net

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Opinions:
        """Judge (B, 3, h, w) normalised images, of their files' size, at (H, W)."""
        teacher, adjustment = self._teacher(images, size), self.config.pseudo_label.adjustment
        if self.voter is None:
            own = self._teacher.prior
            both = teacher if own is None else adjust(teacher, own, adjustment)
            return Opinions(teacher, None, both, both.mean(dim=(2, 3)))
        prior = prior_of_labels(self.voter.shares, self.config.loss)
        ratio, *others = self.voter.judge(images, size)
        both = combine(self._teacher.log_posterior(teacher, prior), ratio, self._exponents)
        votes = combine(prior.log().view(1, -1, 1, 1), ratio, Exponents(1.0, self._exponents.votes))
        return Opinions(teacher, votes, adjust(both, prior, adjustment), *others)

    def features(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the features alone of what a call returns: (B, D) float."""
        if self.voter is None:
            return self(images, size).features
        return self.voter.features(images)
