"""Images and masks from files, by Pillow."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as tf

from utils.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def read_image(path: Path) -> Image.Image:
    """Read a picture of any mode as RGB; grey, CMYK, palette and alpha are converted.

    Raises:
        UserError: no such file, no picture, or a truncated one.
    """
    image = _decoded(path)
    if image.mode.startswith("I"):  # convert() would clip 16 bits to white
        image = Image.fromarray((np.asarray(image) / 256).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def read_photograph(path: Path) -> Image.Image:
    """Read a picture as ``read_image``, turned upright as its camera says and viewers show it.

    Data sets are read without: their masks are drawn on the pixels as they lie in the file.
    """
    return ImageOps.exif_transpose(_decoded(path)).convert("RGB")


def read_mask(path: Path) -> Image.Image:
    """Read class ids as a picture of mode L.

    Raises:
        UserError: as ``read_image``, or more than one channel.
    """
    mask = _decoded(path)
    if mask.mode not in ("L", "P"):
        raise UserError(
            f"{path}: a mask has one 8-bit channel of class ids, this one is {mask.mode}; "
            "convert its colours to ids"
        )
    # convert() would turn palette entries into grey; the entries' numbers are the ids.
    return Image.fromarray(np.asarray(mask))


def picture_size(path: Path) -> tuple[int, int]:
    """Read (height, width) off a file's header.

    Raises:
        UserError: no such file, or no picture.
    """
    with _readable(path), Image.open(path) as picture:
        return picture.height, picture.width


def to_input(image: Image.Image) -> Tensor:
    """Return an RGB picture as a network takes it: (3, H, W) float32, normalised."""
    return tf.normalize(tf.to_dtype(tf.pil_to_tensor(image), scale=True), MEAN, STD)


def to_label(mask: Image.Image) -> Tensor:
    """Return a mask as (H, W) long."""
    return torch.from_numpy(np.asarray(mask).astype(np.int64))


def _decoded(path: Path) -> Image.Image:
    """Open and decode, so that a truncated file shows here."""
    with _readable(path), Image.open(path) as image:
        image.load()
        return image


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn whatever Pillow raises into an error for people."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; correct the list or dataset.root")
    try:
        yield
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError and their own
        reason = str(error).replace(repr(str(path)), "the file")
        raise UserError(
            f"{path}: cannot read this picture ({reason}); replace it or take it off the list"
        ) from error
