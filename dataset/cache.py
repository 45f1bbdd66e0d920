"""Decoded training images in memory that worker processes share."""

from collections.abc import Sequence
from itertools import accumulate
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dataset.lists import Sample, SampleReader, read_sample
from dataset.reading import picture_size
from utils.errors import UserError
from utils.progress import no_bar


class Memory:
    """Reads samples from memory: every image and label is decoded once, when this is made.

    One block of uint8 holds all of them, image (H, W, 3) before label (H, W), in shared memory: all
    worker processes of a loader use the same block. Of several training processes each has its own.

    ``samples`` have masks of their images' sizes; ``threads`` of them are decoded at a time. A
    ``UserError`` if the block does not fit into shared memory, or a picture cannot be read.
    """

    def __init__(self, samples: Sequence[Sample], threads: int) -> None:
        sizes = [picture_size(sample.image) for sample in samples]
        ends = list(accumulate(4 * height * width for height, width in sizes))
        names = (sample.name for sample in samples)
        self._places = dict(zip(names, zip(ends, sizes, strict=True), strict=True))
        try:
            self._block = torch.empty(ends[-1], dtype=torch.uint8).share_memory_()
        except RuntimeError as error:
            raise UserError(
                f"cache: the decoded images take {ends[-1] / 1e9:.2f} GB of shared memory in each "
                f"process, which cannot be allocated ({error}); set cache=null, or enlarge "
                "/dev/shm (docker: --shm-size)"
            ) from error
        with ThreadPool(max(1, threads)) as pool:
            kept = pool.imap(self._keep, samples)
            for _ in tqdm(kept, "decoding", len(samples), disable=no_bar(), leave=False):
                pass

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
