"""Batches: shuffled ones for training, whole images for inference."""

import zlib
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dataset.lists import Sample, read_label, read_picture
from dataset.reading import normalise, picture_size, to_pixels
from utils import IGNORE, IMAGENET, Preprocessing
from utils.config.schema import Config
from utils.distributed import shard
from utils.run.signals import ignore_interrupts

Record = TypeVar("Record", bound=tuple)


class SampleKey(NamedTuple):
    """Index of a training set: a sample, as augmented in an epoch."""

    epoch: int
    index: int


class RandomStreams(NamedTuple):
    """Random generators, as a function of the run's seed and the stage's name."""

    seed: int
    stage: str

    def of(self, *place: int) -> np.random.Generator:
        """Return the generator of a place, such as (epoch, index), the same every time."""
        # A spawn key of another length is another stream; plain entropy would pad with zeros.
        key = (zlib.crc32(self.stage.encode()), *place)
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    def torch_seed(self, *place: int) -> int:
        """Return a seed for torch's generator at a place."""
        return int(self.of(*place).integers(2**63))


def epoch_batches(
    length: int, batch_size: int, epochs: range, chance: RandomStreams, step: int = 0
) -> Iterator[list[SampleKey]]:
    """Shuffle the batches of all epochs; samples that do not fill a last batch are left out.

    One loader serves all epochs: workers start once, and read ahead beyond an epoch's end. A run
    that resumes begins its first epoch with batch ``step``.
    """
    for epoch in epochs:
        keys = [SampleKey(epoch, i) for i in chance.of(epoch).permutation(length).tolist()]
        for first in range(step * batch_size, length - batch_size + 1, batch_size):
            yield keys[first : first + batch_size]
        step = 0


def training_batches(
    dataset: Dataset[Record],
    batch_size: int,
    epochs: range,
    chance: RandomStreams,
    workers: int,
    step: int = 0,
) -> Iterator[Record]:
    """Iterate over the batches of all epochs, ``len(dataset) // batch_size`` an epoch.

    Of several processes each reads its part of every batch. Batches do not depend on ``workers``.

    Args:
        dataset: takes ``SampleKey`` and returns records of tensors.
        batch_size: samples a batch, of all processes together.
        epochs: which epochs; a resumed run starts later.
        chance: orders each epoch.
        workers: processes that read.
        step: batch of the first epoch to begin with.
    """
    batches = epoch_batches(len(dataset), batch_size, epochs, chance, step)
    return iter(_open_loader(dataset, map(shard, batches), workers))


def batch_keys(
    length: int, batch_size: int, epoch: int, step: int, chance: RandomStreams
) -> list[SampleKey]:
    """Return the keys of one batch of an epoch, as ``training_batches`` had them."""
    return next(epoch_batches(length, batch_size, range(epoch, epoch + 1), chance, step))


def _open_loader(
    dataset: Dataset[Record], batches: Iterable[list], workers: int
) -> DataLoader[Record]:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_initialized(),  # false on the CPU of a machine with a GPU
        worker_init_fn=ignore_interrupts,  # this process ends them
    )


class WholeImage(NamedTuple):
    """An image as its files have it. A batch adds a first dimension.

    Bytes go from worker to worker and to the device, a fifth of what floats and longs would be;
    ``WholeImages.to_numbers`` makes those of a batch, where it is.
    """

    image: Tensor  # (3, H, W) uint8 RGB at the file's own size; then float, normalised
    label: Tensor  # (H, W) uint8, 255 everywhere if the sample has no mask; then long
    index: Tensor | int  # position in the list


@dataclass(eq=False)
class WholeImages(Dataset[WholeImage]):
    """Whole images, not augmented."""

    samples: Sequence[Sample]
    preprocessing: Preprocessing = IMAGENET

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> WholeImage:
        """Read an image and its mask."""
        sample = self.samples[index]
        image = read_picture(sample)
        label = read_label(sample) if sample.mask else Image.new("L", image.size, IGNORE)
        return WholeImage(to_pixels(image), torch.from_numpy(np.array(label)), index)

    def to_numbers(self, batch: WholeImage) -> WholeImage:
        """Return a batch with normalised images and long labels, on its device."""
        image = normalise(batch.image, self.preprocessing)
        return batch._replace(image=image, label=batch.label.long())


def whole_images(
    config: Config,
    samples: Sequence[Sample],
    preprocessing: Preprocessing = IMAGENET,
    done: Container[str] = frozenset(),
) -> DataLoader[WholeImage]:
    """Iterate over whole images; those of one size share batches.

    Of several processes each gets every ``world()``-th batch, composed as in one process. Batches
    whose names are all ``done`` are left out: whole ones, since the last digits of an image's
    results can depend on its batch. The config says how many are a batch, and how many processes
    read.
    """
    batches = [
        batch
        for batch in _batches_of_one_size(samples, config.inference.batch_size)
        if not all(samples[index].name in done for index in batch)
    ]
    return _open_loader(WholeImages(samples, preprocessing), shard(batches), config.workers)


def _batches_of_one_size(samples: Sequence[Sample], batch_size: int) -> list[list[int]]:
    """Return positions in the list; batches come in the order of their first images."""
    if batch_size == 1:  # sizes need not be read
        return [[index] for index in range(len(samples))]
    alike: dict[tuple[int, int], list[int]] = {}
    for index, sample in enumerate(samples):
        alike.setdefault(picture_size(sample.image), []).append(index)
    return sorted(
        indices[start : start + batch_size]
        for indices in alike.values()
        for start in range(0, len(indices), batch_size)
    )
