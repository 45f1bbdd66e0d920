"""Images and masks from files, by Pillow."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as tf

from utils.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def read_image(path: Path) -> Image.Image:
    """Read a picture of any mode as RGB; grey, CMYK, palette and alpha are converted.

    Raises:
        UserError: no such file, no picture, or a truncated one.
    """
    with _opened(path) as image:
        return image.convert("RGB")


def read_mask(path: Path) -> Image.Image:
    """Read class ids as a picture of mode L.

    Raises:
        UserError: as ``read_image``, or more than one channel.
    """
    with _opened(path) as mask:
        if mask.mode not in ("L", "P"):
            raise UserError(
                f"{path}: a mask has one 8-bit channel of class ids, this one is {mask.mode}; "
                "convert its colours to ids"
            )
        # convert() would turn palette entries into grey; the entries' numbers are the ids.
        return Image.fromarray(np.asarray(mask))


def sizes_agree(image: Path, mask: Path) -> None:
    """Compare the sizes in two files' headers.

    Raises:
        UserError: they differ, or a header cannot be read.
    """
    sizes = []
    for path in (image, mask):
        try:
            with Image.open(path) as picture:
                sizes.append(f"{picture.height} x {picture.width}")
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"{path}: cannot read this picture ({error})") from error
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{mask}: this mask is {sizes[1]} and its image {image} is {sizes[0]} (height x "
            "width); they must agree"
        )


def to_input(image: Image.Image) -> Tensor:
    """Return an RGB picture as a network takes it: (3, H, W) float32, normalised."""
    return tf.normalize(tf.to_dtype(tf.pil_to_tensor(image), scale=True), MEAN, STD)


def to_label(mask: Image.Image) -> Tensor:
    """Return a mask as (H, W) long."""
    return torch.from_numpy(np.asarray(mask).astype(np.int64))


def _opened(path: Path) -> Image.Image:
    """Open and decode, so that a truncated file shows here."""
    try:
        image = Image.open(path)
        image.load()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(path), "file").split("\n")[0]
        raise UserError(
            f"{path}: cannot read this picture ({reason}); replace it or take it off the list"
        ) from error
    return image
