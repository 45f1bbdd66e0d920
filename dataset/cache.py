"""Decoded training images in memory that worker processes share."""

import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dataset.lists import Sample, SampleReader, read_sample
from dataset.reading import picture_size
from utils.errors import UserError
from utils.progress import no_bar


class Memory:
    """Reads samples from memory: every image and label decoded once, when this is made.

    One block of uint8 holds all of them, image (H, W, 3) before label (H, W). Forked workers see
    the same block, and spawned ones are handed it, so it is there once however many they are; of
    several processes that train together each has its own.

    Args:
        samples: with masks of their images' sizes.
        threads: that decode.

    Raises:
        UserError: the block does not fit into memory; a picture cannot be read.
    """

    def __init__(self, samples: Sequence[Sample], threads: int) -> None:
        sizes = [picture_size(sample.image) for sample in samples]
        ends = list(accumulate(4 * height * width for height, width in sizes))
        self._places = {
            sample.name: (end, size) for sample, end, size in zip(samples, ends, sizes, strict=True)
        }
        self._block = _shared_block(ends[-1])
        with (
            ThreadPoolExecutor(max(1, threads)) as pool,
            tqdm(desc="decoding", total=len(samples), disable=no_bar(), leave=False) as bar,
        ):
            for _ in pool.map(self._keep, samples):
                bar.update()

    def __call__(self, sample: Sample) -> tuple[Image.Image, Image.Image]:
        """Return what ``read_sample`` returns."""
        image, label = self._arrays(sample)
        return Image.fromarray(image), Image.fromarray(label)

    def _keep(self, sample: Sample) -> None:
        for place, picture in zip(self._arrays(sample), read_sample(sample), strict=True):
            place[:] = picture

    def _arrays(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        end, (height, width) = self._places[sample.name]
        pixels = self._block[end - 4 * height * width : end].numpy()
        image, label = pixels[: 3 * height * width], pixels[3 * height * width :]
        return image.reshape(height, width, 3), label.reshape(height, width)


def sample_reader(cache: str | None, samples: Sequence[Sample], threads: int) -> SampleReader:
    """Return what reads these samples: files, or memory if the config says ``cache: ram``."""
    return read_sample if cache is None else Memory(samples, threads)


def _shared_block(size: int) -> torch.Tensor:
    free, processes = _free_memory(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if free is None or size * processes < free:
        try:
            return torch.empty(size, dtype=torch.uint8).share_memory_()
        except RuntimeError as error:
            reason = str(error)
    else:
        each = f"in each of {processes} processes, " if processes > 1 else ""
        reason = f"{each}and {free / 1e9:.2f} GB are free"
    raise UserError(
        f"cache: the decoded images do not fit into shared memory: they take {size / 1e9:.2f} GB, "
        f"{reason}; set cache=null, or enlarge /dev/shm (docker: --shm-size)"
    )


def _free_memory() -> int | None:
    """Bytes that can be shared without swapping; None where the system does not tell."""
    free = []
    meminfo, shared = Path("/proc/meminfo"), Path("/dev/shm")
    if meminfo.is_file():
        free.append(1024 * int(re.search(r"MemAvailable:\s*(\d+)", meminfo.read_text())[1]))
    if shared.is_dir():
        free.append(shutil.disk_usage(shared).free)
    return min(free, default=None)
