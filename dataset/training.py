"""What training steps are given: labeled pairs, and unlabeled images with what retraining needs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dataset.aim import ClassAim, random_pixel
from dataset.lists import Sample, SampleReader, read_sample
from dataset.loader import RandomStreams, SampleKey
from dataset.query import NoPartner, Partner, Querier
from dataset.reading import to_input, to_label
from dataset.transforms import CropParams, random_view, recolour
from dataset.votes import CropVotes, NoVotes, cut_votes
from utils import IGNORE, IMAGENET, Preprocessing
from utils.config.schema import AugmentSection

Record = TypeVar("Record", bound=tuple)


class LabeledPair(NamedTuple):
    """Two labeled images. A batch adds a first dimension."""

    image: Tensor  # (3, H, W) float, normalised
    label: Tensor  # (H, W) long, 255 = ignored
    partner_image: Tensor  # (3, H, W) float, normalised
    partner_label: Tensor  # (H, W) long
    shared_class: Tensor | int  # class id for which the partner was queried, 255 if for none


class RetrainSample(NamedTuple):
    """What a retraining step needs of an unlabeled image. A batch adds a first dimension."""

    image: Tensor  # (3, H, W) float, normalised, as the teacher sees it
    pseudo_label: Tensor  # (H, W) long, 255 = ignored
    student_image: Tensor  # (views, 3, H, W) float, normalised, the same crop in strong colours
    labeled_image: Tensor  # (3, H, W) float, normalised, of a labeled image
    labeled_label: Tensor  # (H, W) long, true
    partner: Partner | NoPartner
    votes: CropVotes | NoVotes = NoVotes()


def parts(batch: Record, count: int) -> list[Record]:
    """Cut a batch, a record of tensors and records, into parts along the first dimension."""
    if not batch:  # a record without fields
        return [batch] * count
    columns = [parts(x, count) if isinstance(x, tuple) else x.chunk(count) for x in batch]
    return [type(batch)._make(row) for row in zip(*columns, strict=True)]


@dataclass(eq=False)
class LabeledPairs(Dataset[LabeledPair]):
    """Stage 1: every labeled image with another one, ``repeat`` times an epoch.

    With a querier the other one is a partner that shares a class. Without, it is the next one of
    the list, shifted by one more every epoch: each image is seen as often as any other.

    With ``augment.aim`` and no querier, the other one is drawn for a class instead, and the crops
    of both are aimed: the first one's at a class that it shows.
    """

    labeled: Sequence[Sample]
    augment: AugmentSection
    chance: RandomStreams
    repeat: int = 1
    querier: Querier | None = None
    read: SampleReader = read_sample
    preprocessing: Preprocessing = IMAGENET

    def __post_init__(self) -> None:
        """Count the pixels of the classes, if crops are aimed."""
        aims = self.augment.aim > 0 and self.querier is None
        self.aim = ClassAim.of(self.labeled, self.augment.aim) if aims else None

    def __len__(self) -> int:
        """Return the number of pairs an epoch."""
        return len(self.labeled) * self.repeat

    def names(self, keys: Iterable[SampleKey]) -> list[str]:
        """Return the names of the images that keys stand for, without partners."""
        return [self.labeled[key.index % len(self.labeled)].name for key in keys]

    def __getitem__(self, key: SampleKey) -> LabeledPair:
        """Read, augment and pair a labeled image."""
        rng, preprocessing, count = self.chance.of(*key), self.preprocessing, len(self.labeled)
        sample = self.labeled[key.index % count]
        image, mask, _ = _weak_view(self, sample, rng)
        pair = to_input(image, preprocessing), to_label(mask)
        if self.querier is not None:
            shared, *partner = self.querier.draw(sample.name, mask, rng, preprocessing)
            return LabeledPair(*pair, *partner, shared)
        if self.aim is not None:
            place, aimed_at = self.aim.draw_image(rng)
        else:
            shift = 1 + (key.index // count + key.epoch * self.repeat) % max(1, count - 1)
            place, aimed_at = (key.index + shift) % count, None
        other, label, _ = _weak_view(self, self.labeled[place], rng, aimed_at)
        return LabeledPair(*pair, to_input(other, preprocessing), to_label(label), IGNORE)


@dataclass(eq=False)
class RetrainSamples(Dataset[RetrainSample]):
    """Stages 4 and 6: every pseudo-labeled image with a labeled image and, if queried, a partner.

    The labeled list repeats until it is as long as the unlabeled one, shifted by one image every
    epoch, so that an unlabeled image is combined with all labeled ones. If it is the longer one,
    each epoch continues where the last one ended.

    A querier draws a partner by an unlabeled image's name and the crop of its pseudo label. Each of
    ``views`` has other strong colours. With ``strong_teacher`` the teacher sees the first one, as
    in the published code.

    With ``augment.aim`` half of the labeled images are drawn for a class, and all crops are aimed:
    the others at a class that the image, or its pseudo label, shows.
    """

    unlabeled: Sequence[Sample]  # their masks are pseudo labels
    labeled: Sequence[Sample]
    augment: AugmentSection
    chance: RandomStreams
    views: int = 1
    strong_teacher: bool = False
    querier: Querier | None = None
    read: SampleReader = read_sample
    preprocessing: Preprocessing = IMAGENET
    votes: Path | None = None  # folder of the votes that stage 2 stored; None: none are read

    def __post_init__(self) -> None:
        """Count the labeled pixels of the classes, if crops are aimed."""
        self.aim = ClassAim.of(self.labeled, self.augment.aim) if self.augment.aim else None

    def __len__(self) -> int:
        """Return the number of unlabeled images."""
        return len(self.unlabeled)

    def names(self, keys: Iterable[SampleKey]) -> list[str]:
        """Return the names of the images that keys stand for, without partners."""
        pairs = ((self.unlabeled[key.index], self._labeled_at(key)[0]) for key in keys)
        return [sample.name for pair in pairs for sample in pair]

    def view(self, key: SampleKey) -> CropParams:
        """Return how the unlabeled image of a key is cut."""
        return _weak_view(self, self.unlabeled[key.index], self.chance.of(*key))[2]

    def _labeled_at(self, key: SampleKey) -> tuple[Sample, int | None]:
        """Return the labeled image, and the class that it was drawn for."""
        if self.aim is not None:
            rng = self.chance.of(*key, 0)  # not that of the views, which draw after reading
            if rng.random() < 0.5:
                place, aimed_at = self.aim.draw_image(rng)
                return self.labeled[place], aimed_at
        count = len(self.labeled)
        if count <= len(self):
            return self.labeled[(key.index + key.epoch) % count], None
        place = key.epoch * len(self) + key.index
        return self.labeled[(place + place // count) % count], None

    def __getitem__(self, key: SampleKey) -> RetrainSample:
        """Read and augment an unlabeled image, a labeled image, and the partner."""
        rng, preprocessing = self.chance.of(*key), self.preprocessing
        sample, (labeled, aimed_at) = self.unlabeled[key.index], self._labeled_at(key)
        weak, mask, view = _weak_view(self, sample, rng)
        views = (recolour(weak, self.augment.strong, rng) for _ in range(self.views))
        strong = torch.stack([to_input(view, preprocessing) for view in views])
        image, label, _ = _weak_view(self, labeled, rng, aimed_at)
        teacher = strong[0] if self.strong_teacher else to_input(weak, preprocessing)
        partner = NoPartner()
        if self.querier is not None:  # last: the views must not depend on it
            partner = self.querier.draw(sample.name, mask, rng, preprocessing)
        labeled = to_input(image, preprocessing), to_label(label)
        votes = NoVotes() if self.votes is None else cut_votes(self.votes, sample, view)
        return RetrainSample(teacher, to_label(mask), strong, *labeled, partner, votes)


def _weak_view(
    data: LabeledPairs | RetrainSamples,
    sample: Sample,
    rng: np.random.Generator,
    aimed_at: int | None = None,
) -> tuple[Image.Image, Image.Image, CropParams]:
    """Cut the same random view from a sample's image and mask; return it too.

    Where crops are aimed, it shows class ``aimed_at``, or if that is None one of the mask's.
    """
    image, mask = data.read(sample)
    if aimed_at is None and data.aim is not None and sample.mask is not None:
        aimed_at = data.aim.draw_class(mask, rng)
    target = None if aimed_at is None else random_pixel(mask, aimed_at, rng)
    view = random_view((image.height, image.width), data.augment, rng, target)
    return view.image(image, data.preprocessing.interpolation), view.mask(mask), view
