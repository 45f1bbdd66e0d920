"""What inference takes: whole images, without chance."""

import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dataset.lists import Sample, read_label
from dataset.reading import picture_size, read_image, read_photograph, to_input, to_label
from utils import IGNORE
from utils.config.schema import InferenceSection
from utils.distributed import mine
from utils.run.signals import ignore_interrupts

Record = TypeVar("Record", bound=tuple)


class SampleKey(NamedTuple):
    """What a training set is asked for: a sample, as augmented in an epoch."""

    epoch: int
    index: int


class Chance(NamedTuple):
    """Where random numbers come from: the run's seed and the stage's name."""

    seed: int
    stage: str

    def of(self, *place: int) -> np.random.Generator:
        """Return the random numbers of a place, such as (epoch, index), the same every time."""
        # A spawn key of another length is another stream; plain entropy would pad with zeros.
        key = (zlib.crc32(self.stage.encode()), *place)
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))

    def torch_seed(self, *place: int) -> int:
        """Return a seed for torch's generator at a place."""
        return int(self.of(*place).integers(2**63))


class EpochBatches(Sampler[list[SampleKey]]):
    """Shuffled batches of the epochs ``first`` to ``last - 1``; what does not fill one is left out.

    One loader serves all epochs: workers start once, and read ahead over an epoch's end. The first
    epoch begins with batch ``step``, for a run that goes on in its middle.
    """

    def __init__(
        self, length: int, batch_size: int, epochs: range, chance: Chance, step: int = 0
    ) -> None:
        self._length, self._batch_size = length, batch_size
        self._epochs, self._chance, self._step = epochs, chance, step

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Yield batches of keys."""
        for epoch in self._epochs:
            order = self._chance.of(epoch).permutation(self._length).tolist()
            first = self._step if epoch == self._epochs.start else 0
            for step in range(first, self._length // self._batch_size):
                chosen = order[step * self._batch_size : (step + 1) * self._batch_size]
                yield [SampleKey(epoch, index) for index in chosen]

    def __len__(self) -> int:
        """Return the number of batches of all epochs."""
        return len(self._epochs) * (self._length // self._batch_size) - self._step


def training_batches(
    dataset: Dataset[Record],
    batch_size: int,
    epochs: range,
    chance: Chance,
    workers: int,
    step: int = 0,
) -> Iterator[Record]:
    """Iterate over the batches of all epochs, ``len(dataset) // batch_size`` an epoch.

    Of several processes each reads its part of every batch.

    Args:
        dataset: takes ``SampleKey`` and returns records of tensors.
        batch_size: samples a batch, of all processes together.
        epochs: which epochs; a run that goes on starts later.
        chance: orders each epoch.
        workers: processes that read; the batches do not depend on it.
        step: batch of the first epoch to begin with.
    """
    sampler = EpochBatches(len(dataset), batch_size, epochs, chance, step)
    return iter(open_loader(dataset, map(mine, sampler), workers))


def batch_seeds(
    length: int, batch_size: int, epochs: range, chance: Chance, step: int = 0
) -> Iterator[Tensor]:
    """Yield seeds, (B,) long, one for each sample of the batches of ``training_batches``."""
    for keys in EpochBatches(length, batch_size, epochs, chance, step):
        yield torch.tensor([chance.torch_seed(*key) for key in mine(keys)])


def batch_keys(
    length: int, batch_size: int, epoch: int, step: int, chance: Chance
) -> list[SampleKey]:
    """Tell what a batch of an epoch was made of; batches are a function of their place."""
    return next(iter(EpochBatches(length, batch_size, range(epoch, epoch + 1), chance, step)))


def open_loader(
    dataset: Dataset[Record], batches: Iterable[list], workers: int
) -> DataLoader[Record]:
    """Read batches of keys in processes that ignore Ctrl-C."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_interrupts,
    )


ImageReader = Callable[[Path], Image.Image]


class WholeImage(NamedTuple):
    """An image as inference takes it. A batch adds a first dimension.

    Attributes:
        image: (3, h, w) float, normalised, shrunk to ``long_side`` if there is one.
        label: (H, W) long at the file's own size, 255 everywhere if the sample has no mask.
        index: position in the list.
    """

    image: Tensor
    label: Tensor
    index: Tensor | int


class WholeImages(Dataset[WholeImage]):
    """Whole images, without chance, for validation, labeling and selection."""

    def __init__(
        self, samples: Sequence[Sample], long_side: int | None, read: ImageReader = read_image
    ) -> None:
        self._samples, self._long_side, self._read = samples, long_side, read

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._samples)

    def __getitem__(self, index: int) -> WholeImage:
        """Read an image and its mask."""
        sample = self._samples[index]
        image = self._read(sample.image)
        if sample.mask is None:
            label = torch.full((image.height, image.width), IGNORE)
        else:
            label = to_label(read_label(sample))
        if self._long_side is not None:
            shrink = self._long_side / max(image.size)
            if shrink < 1:
                size = [max(1, round(side * shrink)) for side in image.size]
                image = image.resize(size, Image.Resampling.BILINEAR)
        return WholeImage(to_input(image), label, index)


def whole_images(
    samples: Sequence[Sample],
    settings: InferenceSection,
    workers: int,
    done: Container[str] = frozenset(),
) -> DataLoader[WholeImage]:
    """Iterate over whole images; those of one size share batches.

    Of several processes each gets every ``world()``-th batch, composed as one process would.

    Args:
        samples: the list.
        settings: the size of images and batches.
        workers: processes that read.
        done: names to leave out, by whole batches: an image's numbers can depend, in their last
            digits, on the batch that it is in.
    """
    batches = [
        batch
        for batch in _batches_of_one_size(samples, settings.batch_size)
        if not all(samples[index].name in done for index in batch)
    ]
    return open_loader(WholeImages(samples, settings.long_side), mine(batches), workers)


def photographs(
    samples: Sequence[Sample], settings: InferenceSection, workers: int
) -> DataLoader[WholeImage]:
    """Iterate over photographs, turned upright, one by one: ``mine`` of them."""
    dataset = WholeImages(samples, settings.long_side, read_photograph)
    return open_loader(dataset, mine([[index] for index in range(len(samples))]), workers)


def _batches_of_one_size(samples: Sequence[Sample], batch_size: int) -> list[list[int]]:
    """Return positions in the list; batches come in the order of their first images."""
    if batch_size == 1:
        return [[index] for index in range(len(samples))]
    alike: dict[tuple[int, int], list[int]] = {}
    for index, sample in enumerate(samples):
        alike.setdefault(picture_size(sample.image), []).append(index)
    return sorted(
        indices[start : start + batch_size]
        for indices in alike.values()
        for start in range(0, len(indices), batch_size)
    )
