"""Who votes on pseudo labels: the nearest labeled patches (section 10 of docs/method.md).

Ours: the paper's query becomes a patch. Labeled images are cut into patches; each location of an
unlabeled image retrieves its 30 nearest patches, in the features of the encoder as it was before
training, and averages their labels. Those features know nothing of the teacher, so that the votes
are evidence that the teacher's probabilities do not hold already. ``calibrate`` fits how far they
are trusted, on labeled images that do not vote for themselves; ``combine`` makes the pseudo label
of teacher and votes by Bayes' rule. Stages 2 and 5 use ``PseudoLabeler``.

To change how pseudo labels are made, this is the file.

Source: ours; docs/rectifier.md for what else was tried. Retrieval from a memory of labeled patches
is Hummingbird's (Balazevic et al., NeurIPS 2023).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.catalog import dataset_info
from dataset.lists import Sample
from dataset.loader import RandomStreams, whole_images
from model.networks import largest_stride, load_frozen, network_of
from model.ops.bilinear import resize
from model.ops.frozen import freeze
from utils.checkpoint import load
from utils.config.schema import Config
from utils.device import Device
from utils.distributed import broadcast, gather_list
from utils.errors import UserError
from utils.evaluation import Predictor, base_size, iterate_batches, resize_images

VOTERS, PATCHES = 512, 20_000  # labeled images and patches that vote on pseudo labels, at most
NEIGHBOURS = 30  # patches that vote
TEMPERATURE = 0.05  # of the cosines, for the weight of a vote
EXPONENTS = [number / 10 for number in range(31)]  # of which the best one is taken
_SMOOTHING = 0.05  # share of the prior in votes: a class without any is not impossible
_FITTED_ON = 4096  # patches by which an exponent is fitted, at most
_ROWS = 2048  # patches that are compared at once


class LabeledPatches(NamedTuple):
    """Features of labeled images' patches, and what their labels show there."""

    features: Tensor  # (N, D) float, of length 1
    shares: Tensor  # (N, C) float, sum to 1: the classes' shares of the labeled pixels
    image: Tensor  # (N,) long: which image they are of

    def prior(self) -> Tensor:
        """Return the classes' shares of all patches, (C,) positive float, sum 1."""
        return as_prior(self.shares.mean(dim=0))


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
    """Average the labels of the nearest labeled patches at every place of (B, D, h, w) maps.

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
        shares and ``sharpen``ed votes, of 4,096 patches at most. For patches of one image
        exponent 1, and infinity.
    """
    if len(patches.image.unique()) < 2:
        return Calibration(1.0, math.inf)
    sampled = LabeledPatches(*(rows[:: math.ceil(len(rows) / _FITTED_ON)] for rows in patches))
    parts = zip(sampled.features.split(_ROWS), sampled.image.split(_ROWS), strict=True)
    votes, prior = torch.cat([_votes(*rows, patches) for rows in parts]), patches.prior()
    return min(
        (
            Calibration(
                exponent,
                -(sampled.shares * sharpen(votes, prior, exponent).log()).sum(1).mean().item(),
            )
            for exponent in EXPONENTS
        ),
        key=lambda fit: fit.cross_entropy,
    )


def sharpen(votes: Tensor, prior: Tensor, exponent: float) -> Tensor:
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


def combine(
    probability: Tensor,
    votes: Tensor,
    prior: Tensor,
    teacher_prior: Tensor | None = None,
    adjustment: float = 0.0,
) -> Tensor:
    """Combine two opinions that are independent given the class, by Bayes' rule.

    Args:
        probability: (B, C, H, W) float in [0, 1], sums to 1 over C: a network's.
        votes: the same, positive: ``sharpen``ed votes.
        prior: (C,) positive float, sum 1: of the votes.
        teacher_prior: the same, of what the network was trained on; None: ``prior``. Both opinions
            hold a prior; the votes' counts in the result, the network's is divided out.
        adjustment: share of the prior that is divided out of the result, too, for rare classes; 0:
            none, 1: all classes are equally probable without evidence.

    Returns:
        (B, C, H, W) float32, sums to 1 over C: probability * votes / (teacher_prior *
        prior ** adjustment), normalised.

    Source: docs/method.md, section 10; the adjustment is Menon et al., ICLR 2021, section 4.1.
    """
    divisor = (prior if teacher_prior is None else teacher_prior).log() + adjustment * prior.log()
    evidence = probability.clamp_min(1e-6).log() + votes.log()
    return (evidence - divisor.view(-1, 1, 1)).softmax(dim=1)


def as_prior(counts: Tensor) -> Tensor:
    """Return the shares of (C,) counts or shares, 0.0001 at least, sum 1."""
    shares = (counts / counts.sum()).clamp_min(1e-4)
    return (shares / shares.sum()).float()


def voting_images(features: Tensor, patches: LabeledPatches) -> Tensor:
    """Return how much each labeled image votes on a (1, D, h, w) map: (images,) float, sum 1.

    The numbers are those of ``LabeledPatches.image``; images whose number is missing have 0.
    """
    shares = torch.zeros(int(patches.image.max()) + 1, device=features.device)
    for rows in _rows(features).split(_ROWS):
        weight, nearest = _nearest(F.normalize(rows.float(), dim=1), None, patches)
        shares.index_add_(0, patches.image[nearest].flatten(), weight.flatten())
    return shares / shares.sum()


def _nearest(rows: Tensor, image: Tensor | None, patches: LabeledPatches) -> tuple[Tensor, Tensor]:
    """Return weights and numbers, (R, 30), of the patches nearest to (R, D) directions.

    Those of (R,) images are left out, if images are given.
    """
    cosines = rows @ patches.features.T
    if image is not None:
        cosines = cosines.masked_fill(image.unsqueeze(1) == patches.image, -torch.inf)
    cosines, nearest = cosines.topk(min(NEIGHBOURS, len(patches.features)))
    return (cosines.float() / TEMPERATURE).softmax(dim=1), nearest


def _votes(rows: Tensor, image: Tensor | None, patches: LabeledPatches) -> Tensor:
    """Vote on (R, D) directions, without the patches of (R,) images: (R, C)."""
    weight, nearest = _nearest(rows, image, patches)
    return torch.einsum("nk,nkc->nc", weight, patches.shares[nearest])


def _rows(features: Tensor) -> Tensor:
    """Return the places of (B, D, h, w) maps as (B * h * w, D) features."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)


class PatchVoter:
    """Labeled patches in the features of the encoder as it was before training.

    Args:
        config: of the run.
        device: where the patches are compared.
        labeled: patches of at most ``VOTERS`` images, drawn at random, vote, ``PATCHES`` in all.
        say: is told which of ``pseudo_label.neighbour_scales`` fits the labeled images best.

    Attributes:
        prior: (C,) float, the classes' shares of the patches.

    Raises:
        UserError: no patch is labeled on more than half of its pixels.

    Source: docs/method.md, section 10.
    """

    @torch.inference_mode()
    def __init__(
        self, config: Config, device: Device, labeled: Sequence[Sample], say: Callable[[str], None]
    ) -> None:
        self._config, self._device = config, device
        chance = RandomStreams(config.seed, "1_supervised")
        # The network with which stage 1 began, as its encoder was pretrained: not dilated.
        torch.manual_seed(chance.torch_seed())
        self._stride = largest_stride(config.model.backbone)
        model = config.model.model_copy(update={"output_stride": self._stride})
        classes = len(dataset_info(config.dataset).classes)
        net = freeze(network_of(model, classes, config.model.pretrained), device)
        self._encoder, self._preprocessing = net.backbone, net.preprocessing
        drawn = chance.of(0, 0, 0).permutation(len(labeled))[:VOTERS]
        self._labeled = [labeled[number] for number in sorted(drawn)]
        fits = []
        for scale in config.pseudo_label.neighbour_scales:
            patches = self._cut_patches(scale, classes, chance)
            if len(patches.image):
                fits.append((broadcast(calibrate, patches), scale, patches))
        if not fits:
            raise UserError(
                "pseudo_label.neighbours: no patch of the labeled images is labeled on more than "
                "half of its pixels; set pseudo_label.neighbours=false"
            )
        fit, self._scale, self._patches = min(fits, key=lambda each: each[0].cross_entropy)
        self._exponent, self.prior = fit.exponent, self._patches.prior()
        say(
            f"{len(self._patches.image)} labeled patches vote, images enlarged {self._scale:g} "
            f"times, exponent {fit.exponent:.1f}, cross entropy {fit.cross_entropy:.3f} on labeled "
            "images left out"
        )

    def votes(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Return probabilities of (B, 3, h, w) images, of their files' size: (B, C, H, W)."""
        votes = neighbour_votes(self._maps(images, self._scale), self._patches)
        return resize(sharpen(votes, self.prior, self._exponent), size)

    def voters_of(self, image: Tensor, count: int) -> list[tuple[Sample, float]]:
        """Return the labeled images that vote most on a (1, 3, h, w) image, and their shares."""
        shares = voting_images(self._maps(image, self._scale), self._patches)
        most = shares.topk(min(count, len(shares)))
        rows = zip(most.indices.tolist(), most.values.tolist(), strict=True)
        return [(self._labeled[number], share) for number, share in rows]

    def _cut_patches(self, scale: float, classes: int, chance: RandomStreams) -> LabeledPatches:
        labeled, found = self._labeled, []
        loader = whole_images(self._config, labeled, self._preprocessing)
        for batch in iterate_batches(loader, self._device, "labeled patches"):
            limit = math.ceil(PATCHES * len(batch.index) / len(labeled))
            rng = chance.of(int(batch.index[0]))
            maps = self._maps(batch.image, scale)
            patches = labeled_patches(maps, batch.label, batch.index, classes, limit, rng)
            found.append([rows.cpu() for rows in patches])
        columns = map(torch.cat, zip(*gather_list(found), strict=True))
        return LabeledPatches(*(rows.to(self._device.torch_device) for rows in columns))

    def _maps(self, images: Tensor, scale: float) -> Tensor:
        base = base_size(images.shape[-2:], self._config.inference.long_side)
        # Multiples of the stride: labels and votes then lie where the maps are.
        size = tuple(self._stride * math.ceil(side * scale / self._stride) for side in base)
        with self._device.autocast():
            images = resize_images(images, size, self._preprocessing.interpolation)
            return self._encoder(images)[-1]


class Opinions(NamedTuple):
    """Class probabilities of unlabeled images, (B, C, H, W) float32, each sums to 1 over C."""

    teacher: Tensor
    votes: Tensor | None  # None without votes
    both: Tensor  # what pseudo labels are the most probable class of


class PseudoLabeler:
    """Makes pseudo labels of whole images: by the teacher, and by votes where the config has them.

    Args:
        config: of the run.
        device: where both work.
        checkpoint: the teacher's.
        labeled: images that vote.
        say: is told how the votes were fitted.

    Attributes:
        config: the same.
        teacher: the network, frozen.
        voter: None without votes.

    Raises:
        UserError: as ``PatchVoter``; a checkpoint of another network.
    """

    def __init__(
        self,
        config: Config,
        device: Device,
        checkpoint: Path,
        labeled: Sequence[Sample],
        say: Callable[[str], None],
    ) -> None:
        self.config = config
        self.teacher = load_frozen(config, device, checkpoint)
        self._predict = Predictor(self.teacher, device, config.inference, config.pseudo_label)
        self.voter, self._prior = None, None
        if config.pseudo_label.neighbours:
            self.voter = PatchVoter(config, device, labeled, say)
            pixels = load(checkpoint).get("class_pixels")
            if pixels is not None:
                self._prior = as_prior(torch.tensor(pixels)).to(device.torch_device)

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Opinions:
        """Judge (B, 3, h, w) normalised images, of their files' size, at (H, W)."""
        teacher = self._predict(images, size)
        if self.voter is None:
            return Opinions(teacher, None, teacher)
        votes, adjustment = self.voter.votes(images, size), self.config.pseudo_label.adjustment
        both = combine(teacher, votes, self.voter.prior, self._prior, adjustment)
        return Opinions(teacher, votes, both)
