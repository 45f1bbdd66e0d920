"""Batches whose chance is a function of (seed, stage, epoch, sample) and of nothing else."""

import zlib
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

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

    One loader serves all epochs: workers start once, and read ahead over an epoch's end.
    """

    def __init__(self, length: int, batch_size: int, epochs: range, chance: Chance) -> None:
        self._length, self._batch_size = length, batch_size
        self._epochs, self._chance = epochs, chance

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Yield batches of keys."""
        for epoch in self._epochs:
            order = self._chance.of(epoch).permutation(self._length).tolist()
            for start in range(0, self._length - self._batch_size + 1, self._batch_size):
                chosen = order[start : start + self._batch_size]
                yield [SampleKey(epoch, index) for index in chosen]

    def __len__(self) -> int:
        """Return the number of batches of all epochs."""
        return len(self._epochs) * (self._length // self._batch_size)


def training_batches(
    dataset: Dataset[Record], batch_size: int, epochs: range, chance: Chance, workers: int
) -> Iterator[Record]:
    """Iterate over the batches of all epochs, ``len(dataset) // batch_size`` an epoch.

    Args:
        dataset: takes ``SampleKey`` and returns records of tensors.
        batch_size: samples a batch.
        epochs: which epochs; a run that goes on starts later.
        chance: orders each epoch.
        workers: processes that read; the batches do not depend on it.
    """
    sampler = EpochBatches(len(dataset), batch_size, epochs, chance)
    pinned = torch.cuda.is_available()
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, pin_memory=pinned)
    return iter(loader)
