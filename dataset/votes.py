"""Votes of labeled patches that stage 2 stores, and what they tell of a training crop.

The votes on an image are the same whatever the network has learnt, so that stage 2 stores them
once, for retraining that labels anew in every iteration (``retrain.labels: average``).
"""

import io
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dataset.lists import Sample, mask_file
from dataset.reading import to_label
from dataset.transforms import CropParams
from utils import IGNORE
from utils.errors import UserError
from utils.files import write_atomically

# Votes of a crop are cut at every fourth pixel or so: patches lie farther apart in nearly all
# crops, and a batch of 81 classes would be half a gigabyte at full size.
_STEP = 4


class CropVotes(NamedTuple):
    """What votes tell of a training crop. A batch adds a first dimension."""

    # (C, h, w) half: log likelihood ratios at about every fourth pixel, from the first to the last,
    # so that corners align.
    log_ratio: Tensor
    shown: Tensor  # (H, W) bool: pixels of the picture; the others are padding


class NoVotes(NamedTuple):
    """Stands where votes are not stored."""


def votes_file(folder: Path, sample: Sample) -> Path:
    """Return where a folder of votes has those on a sample."""
    return mask_file(folder, sample).with_suffix(".npy")


def write_votes(file: Path, log_ratio: np.ndarray) -> None:
    """Write the (C, h, w) float16 log likelihood ratios of an image; do not wait for the disk."""
    content = io.BytesIO()
    np.save(content, log_ratio)
    write_atomically(file, lambda path: path.write_bytes(content.getvalue()), durable=False)


def cut_votes(folder: Path, sample: Sample, view: CropParams) -> CropVotes:
    """Cut the votes on a sample as a view cuts its picture.

    They are interpolated bilinearly. Beyond the picture they are those at its edge, where ``shown``
    is False.

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    file = votes_file(folder, sample)
    try:
        maps = torch.from_numpy(np.load(file)).float().unsqueeze(0)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{file}: holds no votes ({error}); do the stage and later ones again with "
            "--from-stage 2"
        ) from error
    places = torch.from_numpy(view.places(math.ceil(view.crop / _STEP) + 1)).float()
    grid = (2 * places - 1).unsqueeze(0)
    cut = F.grid_sample(maps, grid, padding_mode="border", align_corners=False)
    padded = to_label(view.mask(Image.new("L", (1, 1))))  # 255, of whatever picture
    return CropVotes(cut[0].half(), padded != IGNORE)
