"""Tensors that wait on the disk, so that what is kept costs no memory."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from utils import checkpoint
from utils.distributed import rank


class Spill:
    """Rows of tensors, strings and numbers, read back once in the order they came.

    The system keeps files in memory while it has some to spare, so a small set costs no disk.

    Args:
        folder: beside it, with the number of the process in its name, one holds a file a row
            until it is read; what a killed run left there is removed.
        device: where rows come back to.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = folder.with_name(f"{folder.name}.{rank()}")
        self._device, self._count = device, 0
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, *row: Any) -> None:
        """Put a row away.

        Raises:
            UserError: the disk is full.
        """
        checkpoint.save(self._file(self._count), {"row": row})
        self._count += 1

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Yield the rows and forget them."""
        for number in range(self._count):
            row = checkpoint.load(self._file(number))["row"]
            self._file(number).unlink()
            yield tuple(x.to(self._device) if isinstance(x, torch.Tensor) else x for x in row)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._count = 0

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.pth"
