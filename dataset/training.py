"""What training steps are given: samples, batches, and how many an epoch has."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dataset.lists import Sample, SampleReader, Splits, read_sample
from dataset.loader import Chance, SampleKey
from dataset.query import QueriedImage, QueriedPrototype, Querier, count_kept
from dataset.reading import to_input, to_label
from dataset.transforms import random_view, recolour
from utils import IMAGENET, Preprocessing
from utils.config.schema import AugmentSection, Config, SupervisedSection, TrainingSection
from utils.distributed import world
from utils.errors import UserError
from utils.progress import Work

Record = TypeVar("Record", bound=tuple)


class QueryPair(NamedTuple):
    """A labeled image and its partner. A batch adds a first dimension."""

    image: Tensor  # (3, H, W) float, normalised
    label: Tensor  # (H, W) long, 255 = ignored
    query_image: Tensor  # (3, H, W) float, normalised
    query_label: Tensor  # (H, W) long
    shared_class: Tensor | int  # class id, 255 if the pair shares none


Queried = QueriedImage | QueriedPrototype


class RetrainSample(NamedTuple):
    """What a retraining step needs of an unlabeled image. A batch adds a first dimension."""

    image: Tensor  # (3, H, W) float, normalised, as the teacher sees it
    pseudo_label: Tensor  # (H, W) long, 255 = ignored
    student_image: Tensor  # (views, 3, H, W) float, normalised, the same crop in strong colours
    labeled_image: Tensor  # (3, H, W) float, normalised, of a labeled image
    labeled_label: Tensor  # (H, W) long, true
    queried: Queried  # the partner whose prototype weighs the pseudo label


def parts(batch: Record, count: int) -> list[Record]:
    """Cut a batch, a record of tensors and records, into parts along the first dimension."""
    columns = [parts(x, count) if isinstance(x, tuple) else x.chunk(count) for x in batch]
    return [type(batch)._make(row) for row in zip(*columns, strict=True)]


@dataclass(eq=False)
class LabeledPairs(Dataset[QueryPair]):
    """Stage 1: every labeled image with a partner, ``repeat`` times an epoch."""

    labeled: Sequence[Sample]
    querier: Querier
    augment: AugmentSection
    chance: Chance
    repeat: int = 1
    read: SampleReader = read_sample
    preprocessing: Preprocessing = IMAGENET

    def __len__(self) -> int:
        """Return the number of pairs an epoch."""
        return len(self.labeled) * self.repeat

    def names(self, keys: Iterable[SampleKey]) -> list[str]:
        """Return the names of the images that keys stand for, without partners."""
        return [self.labeled[key.index % len(self.labeled)].name for key in keys]

    def __getitem__(self, key: SampleKey) -> QueryPair:
        """Read, augment and pair a labeled image."""
        rng, preprocessing = self.chance.of(*key), self.preprocessing
        sample = self.labeled[key.index % len(self.labeled)]
        image, mask = _weak_view(self, sample, rng)
        shared, _, *query = self.querier.draw(sample.name, mask, rng, preprocessing)
        return QueryPair(to_input(image, preprocessing), to_label(mask), *query, shared)


@dataclass(eq=False)
class RetrainSamples(Dataset[RetrainSample]):
    """Stages 4 and 6: every pseudo-labeled image with a partner and a labeled image.

    The labeled list repeats until it is as long as the unlabeled one, shifted by one image every
    epoch, so that an unlabeled image is combined with all labeled ones. If it is the longer one,
    each epoch continues where the last one ended.

    ``query``, ``draw`` or ``choose`` of a querier, draws a partner by an unlabeled image's name and
    the crop of its pseudo label. Each of ``views`` has other strong colours. With
    ``strong_teacher`` the teacher sees the first one, as in the published code.
    """

    unlabeled: Sequence[Sample]  # their masks are pseudo labels
    labeled: Sequence[Sample]
    query: Callable[[str, Image.Image, np.random.Generator], Queried]
    augment: AugmentSection
    chance: Chance
    views: int = 1
    strong_teacher: bool = False
    read: SampleReader = read_sample
    preprocessing: Preprocessing = IMAGENET

    def __len__(self) -> int:
        """Return the number of unlabeled images."""
        return len(self.unlabeled)

    def names(self, keys: Iterable[SampleKey]) -> list[str]:
        """Return the names of the images that keys stand for, without partners."""
        pairs = ((self.unlabeled[key.index], self._labeled_at(key)) for key in keys)
        return [sample.name for pair in pairs for sample in pair]

    def _labeled_at(self, key: SampleKey) -> Sample:
        count = len(self.labeled)
        if count <= len(self):
            return self.labeled[(key.index + key.epoch) % count]
        place = key.epoch * len(self) + key.index
        return self.labeled[(place + place // count) % count]

    def __getitem__(self, key: SampleKey) -> RetrainSample:
        """Read and augment an unlabeled image, a labeled image, and what is queried."""
        rng, preprocessing = self.chance.of(*key), self.preprocessing
        sample, labeled = self.unlabeled[key.index], self._labeled_at(key)
        weak, mask = _weak_view(self, sample, rng)
        views = (recolour(weak, self.augment.strong, rng) for _ in range(self.views))
        strong = torch.stack([to_input(view, preprocessing) for view in views])
        image, label = _weak_view(self, labeled, rng)
        teacher = strong[0] if self.strong_teacher else to_input(weak, preprocessing)
        queried = self.query(sample.name, mask, rng)  # last: the views must not depend on it
        labeled = to_input(image, preprocessing), to_label(label)
        return RetrainSample(teacher, to_label(mask), strong, *labeled, queried)


def _weak_view(
    data: LabeledPairs | RetrainSamples, sample: Sample, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image]:
    """Cut the same random view from a sample's image and mask."""
    image, mask = data.read(sample)
    view = random_view((image.height, image.width), data.augment, rng)
    return view.image(image, data.preprocessing.interpolation), view.mask(mask)


def repeats(settings: SupervisedSection, labeled: Sequence[Sample]) -> int:
    """Return how often an epoch of stage 1 passes the labeled list."""
    return 2 if len(labeled) < settings.repeat_below else 1


def refuse_batch_sizes(config: Config, splits: Splits) -> None:
    """Raise a ``UserError`` if a batch exceeds an epoch or is no equal share for each process."""
    labeled = len(splits.labeled) * repeats(config.supervised, splits.labeled)
    unlabeled = len(splits.unlabeled)
    unlabeled = count_kept(unlabeled, config.select.keep) if 3 in config.stages else unlabeled
    mixed = 6 in config.stages and config.retrain.mix == "unlabeled"
    if mixed and config.retrain.batch_size < 2 * world():
        raise UserError(
            f"retrain.batch_size: {config.retrain.batch_size} gives {world()} processes less than "
            "two images each, which retrain.mix=unlabeled mixes; raise it, or set retrain.mix=none"
        )
    epochs = [("supervised", labeled), ("retrain", unlabeled)]
    for key, samples in epochs[: 1 + (6 in config.stages)]:
        size, cuts = getattr(config, key).batch_size, getattr(config, key).accumulate
        name = f"{key}.batch_size: {size}"
        if size > samples:
            mend = "lower it" if samples > 1 else "give it a list of more images"
            raise UserError(f"{name} is larger than the {samples} samples of an epoch; {mend}")
        if size < world():
            raise UserError(f"{name} is less than {world()} processes; raise it")
        if cuts > 1 and size % (cuts * world()):
            raise UserError(
                f"{key}.accumulate: {cuts} does not cut the {size} images of a batch evenly for "
                f"{world()} processes; change it or {key}.batch_size"
            )


def planned_work(config: Config, splits: Splits) -> dict[str, Work]:
    """Return the work of each stage that runs, by its name, for the time left of a run.

    In pixels that pass networks, three times for crops that are learnt from: backward costs twice
    as much as forward. Images are taken as squares.
    """
    stages, labeled, unlabeled = config.stages, len(splits.labeled), len(splits.unlabeled)
    reliable = count_kept(unlabeled, config.select.keep) if 3 in stages else unlabeled
    crop, side = config.augment.crop_size**2, config.inference.long_side or config.augment.base_size
    labeling = config.pseudo_label
    views = sum(scale**2 for scale in labeling.scales) * (1 + labeling.flip)
    if labeling.neighbours:
        views += sum(scale**2 for scale in labeling.neighbour_scales) / len(
            labeling.neighbour_scales
        )

    def training(settings: TrainingSection, samples: int, crops: int) -> float:
        steps = samples // settings.batch_size
        return (settings.iterations or steps * settings.epochs) * settings.batch_size * crops * crop

    retrain = config.retrain
    student = 1 + retrain.learn_queried + retrain.views + (retrain.feature_dropout > 0)
    pairs = labeled * repeats(config.supervised, splits.labeled)
    plan = {"1_supervised": Work("supervised", training(config.supervised, pairs, 2 * 3))}
    if 2 in stages:
        plan["2_pseudo_label"] = Work("label", unlabeled * views * side**2)
    if 3 in stages:
        plan["3_select"] = Work("select", (labeled + unlabeled) * side**2)
        plan["4_retrain"] = Work("retrain", training(retrain, reliable, 3 * student + 1))
        both = 2 if config.relabel == "both" else 1
        plan["5_relabel"] = Work("label", (unlabeled - reliable) * views * both * side**2)
    if 6 in stages:
        plan["6_retrain"] = Work("retrain", training(retrain, unlabeled, 3 * student + 1))
    return plan
