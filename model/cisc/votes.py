"""Who votes on pseudo labels: the nearest labeled patches (section 10 of docs/method.md).

Ours: the paper's query becomes a patch. Labeled images are cut into patches; each location of an
unlabeled image retrieves its 30 nearest patches, in the features of the encoder as it was before
training, and averages their labels. Those features know nothing of the teacher, so that the votes
are evidence that the teacher's probabilities do not hold already. ``calibration.py`` fits how far
they are trusted, ``pseudo_labels.py`` combines both.

To change who votes, this is the file.

Source: ours; docs/rectifier.md for what else was tried. Retrieval from a memory of labeled patches
is Hummingbird's (Balazevic et al., NeurIPS 2023).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.catalog import dataset_info
from dataset.lists import Sample
from dataset.loader import RandomStreams, whole_images
from model.networks import largest_stride, network_of
from model.ops.bilinear import resize
from model.ops.frozen import freeze
from utils.config.schema import Config
from utils.device import Device
from utils.distributed import gather_list
from utils.errors import UserError
from utils.evaluation import base_size, iterate_batches, resize_images

VOTERS, PATCHES = 512, 20_000  # labeled images and patches that vote on pseudo labels, at most
NEIGHBOURS = 30  # patches that vote
TEMPERATURE = 0.05  # of the cosines, for the weight of a vote
_COMPONENTS = 256  # of the features, that are compared
_SMOOTHING = 0.05  # share of the prior in votes: a class without any is not impossible
_MARGIN = 3  # places that a tile sees beyond each of its edges
_ROWS = 2048  # patches that are compared at once


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

        Votes by 20,000 patches then cost a fifth. docs/rectifier.md has what it does to labels.
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


def encode_tiles(
    encode: Callable[[Tensor], Tensor], images: Tensor, size: int, stride: int
) -> Tensor:
    """Encode images tile by tile: what the encoder needs of memory is that of a tile.

    Args:
        encode: (B, 3, h, w) to (B, D, h / stride, w / stride).
        images: (B, 3, H, W) float; H and W are multiples of the stride.
        size: of a tile with its margins, pixels, at most, unless the margins leave no place of it.
        stride: of the encoder.

    Returns:
        (B, D, H / stride, W / stride). Tiles see ``_MARGIN`` places beyond their edges, so that
        only what lies farther away is missing from the features.
    """
    height, width = images.shape[-2:]
    margin, rows = _MARGIN * stride, []
    side = max(1, size // stride - 2 * _MARGIN) * stride
    for top in range(0, height, side):
        row = []
        for left in range(0, width, side):
            y, x = max(0, top - margin), max(0, left - margin)
            tile = images[..., y : top + side + margin, x : left + side + margin]
            first = (top - y) // stride, (left - x) // stride
            last = (min(top + side, height) - y) // stride, (min(left + side, width) - x) // stride
            row.append(encode(tile)[..., first[0] : last[0], first[1] : last[1]])
        rows.append(torch.cat(row, dim=-1))
    return torch.cat(rows, dim=-2)


class VotingEncoder:
    """The encoder as it was before training, on images that are enlarged first.

    Args:
        config: of the run.
        device: where it works.
    """

    @torch.inference_mode()
    def __init__(self, config: Config, device: Device) -> None:
        self._device, self._long_side = device, config.inference.long_side
        self._window = config.inference.window
        # The network with which stage 1 began, as its encoder was pretrained: not dilated.
        torch.manual_seed(RandomStreams(config.seed, "1_supervised").torch_seed())
        self._stride = largest_stride(config.model.backbone)
        model = config.model.model_copy(update={"output_stride": self._stride})
        classes = len(dataset_info(config.dataset).classes)
        net = freeze(network_of(model, classes, config.model.pretrained), device)
        self._backbone, self.preprocessing = net.backbone, net.preprocessing

    @torch.inference_mode()
    def __call__(self, images: Tensor, factor: float) -> Tensor:
        """Return the last map, (B, D, h', w'), of (B, 3, h, w) images of their files' size."""
        base = base_size(images.shape[-2:], self._long_side)
        # Multiples of the stride: labels and votes then lie where the maps are.
        size = tuple(self._stride * math.ceil(side * factor / self._stride) for side in base)
        images = resize_images(images, size, self.preprocessing.interpolation)
        with self._device.autocast():
            if self._window is None or max(size) <= self._window.size:
                return self._backbone(images)[-1]
            return encode_tiles(
                lambda tile: self._backbone(tile)[-1], images, self._window.size, self._stride
            )


class Judgement(NamedTuple):
    """What votes tell of images."""

    log_ratio: Tensor  # (B, C, H, W) float: see ``log_ratio``
    features: Tensor  # (B, D) float: means of the voter's maps
    by_patch: Tensor  # (B, C, h, w) float: ``log_ratio`` where the voter has patches


@dataclass(frozen=True)
class PatchVoter:
    """Labeled patches that vote on images which are enlarged by a factor.

    Attributes:
        encoder: has the features.
        factor: of the images' sides.
        patches: vote.
        labeled: the images that the patches' numbers are of.
    """

    encoder: VotingEncoder
    factor: float
    patches: LabeledPatches
    labeled: Sequence[Sample]

    @cached_property
    def prior(self) -> Tensor:
        """(C,) positive float, sum 1: the classes' shares of the patches."""
        return self.patches.prior()

    @torch.inference_mode()
    def judge(self, images: Tensor, size: tuple[int, int]) -> "Judgement":
        """Vote on (B, 3, h, w) images, of their files' size, at (H, W)."""
        maps = self.encoder(images, self.factor)
        by_patch = log_ratio(neighbour_votes(maps, self.patches), self.prior)
        return Judgement(resize(by_patch, size), maps.float().mean(dim=(2, 3)), by_patch)

    def without(self, samples: Sequence[Sample]) -> "PatchVoter":
        """Return the voter without the patches of some labeled images."""
        numbers = [number for number, sample in enumerate(self.labeled) if sample in samples]
        left_out = torch.tensor(numbers, dtype=torch.long, device=self.patches.image.device)
        return replace(self, patches=self.patches.without(left_out))

    @torch.inference_mode()
    def voters_of(self, image: Tensor, count: int) -> list[tuple[Sample, float]]:
        """Return the labeled images that vote most on a (1, 3, h, w) image, and their shares."""
        shares = voting_images(self.encoder(image, self.factor), self.patches)
        most = shares.topk(min(count, len(shares)))
        rows = zip(most.indices.tolist(), most.values.tolist(), strict=True)
        return [(self.labeled[number], share) for number, share in rows]


@torch.inference_mode()
def cut_patches(
    config: Config, device: Device, labeled: Sequence[Sample], factors: Sequence[float]
) -> list[PatchVoter]:
    """Cut labeled images into patches, once for each factor by which they are enlarged.

    Args:
        config: of the run.
        device: where the patches are compared.
        labeled: patches of at most ``VOTERS`` images, drawn at random, vote, ``PATCHES`` in all.
        factors: of the images' sides.

    Returns:
        A voter for each factor.

    Raises:
        UserError: no patch is labeled on more than half of its pixels.

    Source: docs/method.md, section 10.
    """
    chance, encoder = RandomStreams(config.seed, "1_supervised"), VotingEncoder(config, device)
    drawn = chance.of(0, 0, 0).permutation(len(labeled))[:VOTERS]
    labeled = [labeled[number] for number in sorted(drawn)]
    classes = len(dataset_info(config.dataset).classes)
    loader, found = whole_images(config, labeled, encoder.preprocessing), []
    for batch in iterate_batches(loader, device, "labeled patches"):
        limit = math.ceil(PATCHES * len(batch.index) / len(labeled))
        of_batch = []
        for factor in factors:
            maps, rng = encoder(batch.image, factor), chance.of(int(batch.index[0]))
            cut = labeled_patches(maps, batch.label, batch.index, classes, limit, rng)
            of_batch.append([rows.cpu() for rows in cut[:3]])
        found.append(of_batch)
    by_factor = zip(factors, zip(*gather_list(found), strict=True), strict=True)
    voters = []
    for factor, parts in by_factor:
        columns = map(torch.cat, zip(*parts, strict=True))
        patches = LabeledPatches(*(rows.to(device.torch_device) for rows in columns))
        voters.append(PatchVoter(encoder, factor, patches, labeled))
    voters = [voter for voter in voters if len(voter.patches.image)]
    if not voters:
        raise UserError(
            "pseudo_label.neighbours: no patch of the labeled images is labeled on more than half "
            "of its pixels; set pseudo_label.neighbours=false"
        )
    return voters
