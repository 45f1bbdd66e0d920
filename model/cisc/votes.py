"""Who votes on pseudo labels: the nearest labeled patches (section 10 of docs/method.md).

Ours: the paper's query becomes a patch. Labeled images are cut into patches; each location of an
unlabeled image retrieves its 30 nearest patches, in the features of the encoder as it was before
training, or of several (``pseudo_label.voters``), and averages their labels. Those features know
nothing of the teacher, so that the votes are evidence that the teacher's probabilities do not hold
already. ``calibration.py`` fits how far they are trusted, ``pseudo_labels.py`` combines both.

To change who votes, this is the file.

Source: ours; docs/rectifier.md for what else was tried. Retrieval from a memory of labeled patches
is Hummingbird's (Balazevic et al., NeurIPS 2023).
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.catalog import dataset_info
from dataset.lists import Sample, Splits
from dataset.loader import RandomStreams, whole_images
from dataset.reading import picture_size
from model.cisc.voting_encoder import VotingEncoder
from model.networks.timm_encoders import preprocessing_of
from model.ops.bilinear import resize
from utils.config.schema import Config
from utils.device import Device
from utils.distributed import gather_list
from utils.errors import UserError
from utils.evaluation import base_size, iterate_batches

VOTERS, PATCHES = 512, 20_000  # labeled images and patches that vote on pseudo labels, at most
NEIGHBOURS = 30  # patches that vote
TEMPERATURE = 0.05  # of the cosines, for the weight of a vote
_COMPONENTS = 256  # of the features, that are compared
_SMOOTHING = 0.05  # share of the prior in votes: a class without any is not impossible
_ROWS = 2048  # patches that are compared at once
_MUCH = 2e9  # bytes that a user should know how to lower


class LabeledPatches(NamedTuple):
    """Features of labeled images' patches, and what their labels show there."""

    features: Tensor  # (N, D) float, of length 1; or (N, 256), their principal components
    shares: Tensor  # (N, C) float, sum to 1: the classes' shares of the labeled pixels
    image: Tensor  # (N,) long: which image they are of
    basis: Tensor | None = None  # (D, 256) float, orthonormal, of the components; None: none

    def without(self, images: Tensor) -> "LabeledPatches":
        """Leave out the patches of images, (I,) long."""
        kept = ~torch.isin(self.image, images)
        rows = (self.features[kept], self.shares[kept], self.image[kept])
        return self._replace(**dict(zip(self._fields, rows, strict=False)))

    def project(self) -> "LabeledPatches":
        """Keep the 256 principal components of the features, not centred: cosines stay close.

        It pays for encoders with many channels, 2,048 of ResNets; EfficientNet-Lite has 320.
        """
        if self.features.shape[1] <= _COMPONENTS:
            return self
        features = self.features.double().cpu()
        basis = torch.linalg.eigh(features.T @ features).eigenvectors[:, -_COMPONENTS:]
        basis = basis.to(self.features)
        return self._replace(features=self.features @ basis, basis=basis)

    def prior(self) -> Tensor:
        """Return the classes' shares of all patches, (C,) positive float, sum 1."""
        return as_prior(self.shares.mean(dim=0))


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
    parts = (_nearest(rows, patches) for rows in _rows(features).split(_ROWS))
    votes = [torch.einsum("nk,nkc->nc", weight, patches.shares[near]) for weight, near in parts]
    batch, _, height, width = features.shape
    return torch.cat(votes).view(batch, height, width, -1).permute(0, 3, 1, 2)


def log_ratio(votes: Tensor, prior: Tensor) -> Tensor:
    """Return what votes tell of each class: the logarithm of their likelihood ratio.

    Args:
        votes: (B, C, ...) float in [0, 1], sums to 1 over C.
        prior: (C,) positive float, sum 1. Votes that equal it tell nothing: 0.

    Returns:
        (B, C, ...) float, at least log 0.05: a class without any vote is not impossible.
    """
    prior = prior.view(-1, *[1] * (votes.dim() - 2))
    return ((1 - _SMOOTHING) * votes / prior + _SMOOTHING).log()


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
        weight, nearest = _nearest(rows, patches)
        shares.index_add_(0, patches.image[nearest].flatten(), weight.flatten())
    return shares / shares.sum()


def _nearest(rows: Tensor, patches: LabeledPatches) -> tuple[Tensor, Tensor]:
    """Return weights and numbers, (R, 30), of the patches nearest to (R, D) features."""
    rows = F.normalize(rows.float(), dim=1)
    if patches.basis is not None:
        rows = rows @ patches.basis
    cosines, nearest = (rows @ patches.features.T).topk(min(NEIGHBOURS, len(patches.features)))
    return (cosines.float() / TEMPERATURE).softmax(dim=1), nearest


def _rows(features: Tensor) -> Tensor:
    """Return the places of (B, D, h, w) maps as (B * h * w, D) features."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)


class Judgement(NamedTuple):
    """What votes tell of images."""

    log_ratio: Tensor  # (B, C, H, W) float: see ``log_ratio``; the mean over encoders
    features: Tensor  # (B, D) float: means of the first encoder's maps
    by_patch: Tensor  # (B, C, h, w) float: ``log_ratio`` where the first encoder has patches


class Memory(NamedTuple):
    """Labeled patches in the features of an encoder."""

    encoder: VotingEncoder
    patches: LabeledPatches


@dataclass(frozen=True)
class PatchVoter:
    """Labeled patches that vote on images which are enlarged by a factor.

    Attributes:
        memories: one an encoder; what they tell is averaged on the grid of the first one's maps.
        factor: of the images' sides.
        labeled: the images that the patches' numbers are of.
    """

    memories: Sequence[Memory]
    factor: float
    labeled: Sequence[Sample]

    @cached_property
    def shares(self) -> Tensor:
        """(C,) float, sum 1: the classes' shares of the first encoder's patches."""
        return self.memories[0].patches.shares.mean(dim=0)

    @property
    def is_empty(self) -> bool:
        """Whether an encoder has no patch."""
        return not all(len(memory.patches.image) for memory in self.memories)

    @torch.inference_mode()
    def judge(self, images: Tensor, size: tuple[int, int]) -> "Judgement":
        """Vote on (B, 3, h, w) images, of their files' size, at (H, W)."""
        ratios, features = [], []
        for encoder, patches in self.memories:
            maps = encoder(images, self.factor)
            ratios.append(log_ratio(neighbour_votes(maps, patches), patches.prior()))
            features.append(maps.float().mean(dim=(2, 3)))
        grid = ratios[0].shape[-2:]
        same = [x if x.shape[-2:] == grid else resize(x, grid) for x in ratios]
        by_patch = torch.stack(same).mean(dim=0)
        return Judgement(resize(by_patch, size), features[0], by_patch)

    def features(self, images: Tensor) -> Tensor:
        """Return the means of the first encoder's maps of (B, 3, h, w) images: (B, D) float."""
        return self.memories[0].encoder(images, self.factor).float().mean(dim=(2, 3))

    def without(self, samples: Sequence[Sample]) -> "PatchVoter":
        """Return the voter without the patches of some labeled images."""
        numbers = [number for number, sample in enumerate(self.labeled) if sample in samples]
        left_out = torch.tensor(numbers, dtype=torch.long)
        return self._with(lambda patches: patches.without(left_out.to(patches.image.device)))

    def project(self) -> "PatchVoter":
        """Return the voter with ``LabeledPatches.project`` of its patches."""
        return self._with(LabeledPatches.project)

    def _with(self, change: Callable[[LabeledPatches], LabeledPatches]) -> "PatchVoter":
        changed = [memory._replace(patches=change(memory.patches)) for memory in self.memories]
        return replace(self, memories=changed)

    @torch.inference_mode()
    def voters_of(self, image: Tensor, count: int) -> list[tuple[Sample, float]]:
        """Return the labeled images that vote most on a (1, 3, h, w) image, and their shares."""
        shares = torch.zeros(len(self.labeled), device=image.device)
        for encoder, patches in self.memories:
            own = voting_images(encoder(image, self.factor), patches)
            shares[: len(own)] += own / len(self.memories)
        most = shares.topk(min(count, len(shares)))
        rows = zip(most.indices.tolist(), most.values.tolist(), strict=True)
        return [(self.labeled[number], share) for number, share in rows]


def describe_voters(config: Config, device: Device, splits: Splits) -> str:
    """Say which encoders compare patches, and what memory that takes, before anything is trained.

    Args:
        config: of the run.
        device: where the patches will be compared.
        splits: whose labeled and unlabeled images will be voted on.

    Returns:
        One line. The figure is for the largest image and factor, patches included.

    Raises:
        UserError: no such encoder, or its weights are not here.
    """
    encoders, factors = _encoders(config, device), config.pseudo_label.neighbour_scales
    with ThreadPool() as pool:
        images = [sample.image for sample in (*splits.labeled, *splits.unlabeled)]
        sizes = Counter(pool.map(picture_size, images))
    batches = {  # of one size: images and their height and width as they pass
        size: (min(count, config.inference.batch_size), base_size(size, config.inference.long_side))
        for size, count in sizes.items()
    }
    size = max(batches, key=lambda size: batches[size][0] * math.prod(batches[size][1]))
    passing, (height, width) = batches[size]
    passes = [passing * encoder.estimate_memory(size, max(factors)) for encoder in encoders]
    voting = min(len(splits.labeled), VOTERS)
    places = [voting * math.prod(encoders[0].grid(size, factor)) for factor in factors]
    rows = [min(PATCHES, count) for count in places]
    held = [4 * count * encoder.channels for count in rows for encoder in encoders]
    memory = max(passes) + sum(held) + 4 * max(rows) * _ROWS
    named = " and ".join(encoder.name for encoder in encoders)
    needed = f"about {memory / 1e9:.1f} GB for the largest images, {width} x {height}"
    lower = "inference.window, inference.batch_size or pseudo_label.neighbour_scales"
    hint = f"; to lower that, set {lower}" if memory > _MUCH else ""
    return f"votes: features of {named}; {needed}, enlarged {max(factors):g} times{hint}"


def _encoders(config: Config, device: Device) -> list[VotingEncoder]:
    backbones = config.pseudo_label.voters
    if backbones is None:
        return [VotingEncoder(config, device, config.model.backbone)]
    try:
        return [VotingEncoder(config, device, backbone) for backbone in backbones]
    except UserError as error:
        raise UserError(f"pseudo_label.voters: {error}") from error


@torch.inference_mode()
def cut_patches(
    config: Config, device: Device, labeled: Sequence[Sample], factors: Sequence[float]
) -> list[PatchVoter]:
    """Cut labeled images into patches, once for each factor by which they are enlarged.

    Args:
        config: of the run; ``pseudo_label.voters`` are the encoders.
        device: where the patches are compared.
        labeled: patches of at most ``VOTERS`` images, drawn at random, vote, ``PATCHES`` in all of
            each encoder.
        factors: of the images' sides.

    Returns:
        A voter for each factor.

    Raises:
        UserError: no patch is labeled on more than half of its pixels; an encoder's weights are
            not here.

    Source: docs/method.md, section 10.
    """
    chance = RandomStreams(config.seed, "1_supervised")
    encoders = _encoders(config, device)
    drawn = chance.of(0, 0, 0).permutation(len(labeled))[:VOTERS]
    labeled = [labeled[number] for number in sorted(drawn)]
    classes = len(dataset_info(config.dataset).classes)
    loader, found = whole_images(config, labeled, preprocessing_of(config.model.backbone)), []
    kinds = [(factor, encoder) for factor in factors for encoder in encoders]
    limit = math.ceil(PATCHES / len(labeled))
    for batch in iterate_batches(loader, device, "labeled patches"):
        of_batch = []
        for factor, encoder in kinds:
            columns = (x.split(1) for x in (encoder(batch.image, factor), batch.label, batch.index))
            cut = [  # one by one, so that the batch size does not choose
                labeled_patches(*image, classes, limit, chance.of(int(image[-1])))[:3]
                for image in zip(*columns, strict=True)
            ]
            of_batch.append([torch.cat(rows).cpu() for rows in zip(*cut, strict=True)])
        found.append(of_batch)
    memories = []
    for (_, encoder), parts in zip(kinds, zip(*gather_list(found), strict=True), strict=True):
        columns = map(torch.cat, zip(*parts, strict=True))
        patches = LabeledPatches(*(rows.to(device.torch_device) for rows in columns))
        memories.append(Memory(encoder, patches))
    count = len(encoders)
    voters = [
        PatchVoter(memories[place * count : (place + 1) * count], factor, labeled)
        for place, factor in enumerate(factors)
    ]
    voters = [voter for voter in voters if not voter.is_empty]
    if not voters:
        raise UserError(
            "pseudo_label.neighbours: no patch of the labeled images is labeled on more than half "
            "of its pixels; set pseudo_label.neighbours=false"
        )
    return voters
