"""Boxes cut from and pasted into the student's images, with their labels and weights."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from utils import IGNORE


class View(NamedTuple):
    """Unlabeled images as the student sees them, and what it should learn from them."""

    image: Tensor  # (B, 3, H, W) float, normalised
    label: Tensor  # (B, H, W) long, 255 = ignored
    weight: Tensor  # (B, H, W) float in [0, 1]


def random_boxes(like: Tensor) -> Tensor:
    """Draw a box for each of (B, H, W) maps: bool, True inside, on their device.

    With probability 1/2 it has an area of U(0.02, 0.4) of the map and an aspect ratio of
    U(0.3, 1 / 0.3), cut at the edges; else it is empty. Random numbers are torch's, of the CPU.

    Source: the box as UniMatch (Yang et al., CVPR 2023) describes it.
    """
    height, width = like.shape[-2:]
    boxes = torch.zeros(like.shape, dtype=torch.bool)
    for box in boxes:
        chance, share, ratio, y, x = torch.rand(5).tolist()
        area, aspect = (0.02 + 0.38 * share) * height * width, 0.3 + (1 / 0.3 - 0.3) * ratio
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        top, left = int(y * max(1, height - rows)), int(x * max(1, width - columns))
        box[top : top + rows, left : left + columns] = chance < 0.5
    return boxes.to(like.device)


def keep_whole(view: View, _: View) -> View:
    """Return the view as it is."""
    return view


def cut_out(view: View, _: View) -> View:
    """Blank a random box of each image: mean colour, ignored label (DeVries and Taylor, 2017)."""
    blank = View(torch.zeros(()), torch.tensor(IGNORE), torch.zeros(()))
    return _pasted(view, View(*(value.to(view.image.device) for value in blank)))


def cut_mix(view: View, _: View) -> View:
    """Paste a random box of each image into the one before it (Yun et al., ICCV 2019)."""
    return _pasted(view, View(*(value.roll(-1, dims=0) for value in view)))


def paste_queried(view: View, queried: View) -> View:
    """Paste a random box of each queried labeled image, with its true label, into its image."""
    return _pasted(view, queried)


def _pasted(view: View, other: View) -> View:
    boxes = random_boxes(view.label)
    image = torch.where(boxes.unsqueeze(1), other.image, view.image)
    label = torch.where(boxes, other.label, view.label)
    return View(image, label, torch.where(boxes, other.weight, view.weight))
