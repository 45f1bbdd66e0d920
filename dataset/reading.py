"""Images and masks from files, by Pillow."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tf

from utils import IGNORE, Preprocessing
from utils.errors import UserError

_TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = [_TURNS[orientation] for orientation in (5, 6, 7, 8)]
_SCALED = ("L;2", "L;4")  # raw modes whose values Pillow spreads over 0 to 255


def read_image(path: Path) -> Image.Image:
    """Read a picture of any mode as RGB, turned upright by its EXIF orientation, as viewers do.

    Raises:
        UserError: it cannot be read completely.
    """
    with _readable(path), Image.open(path) as image:
        return upright(image, path)


def upright(image: Image.Image, name: str | Path) -> Image.Image:
    """Return a copy of a picture as RGB, turned upright by the EXIF orientation that it carries.

    Args:
        image: of any mode; a copy carries no EXIF, so that it is not turned again.
        name: for the error.

    Raises:
        UserError: it holds floating-point numbers.
    """
    turn = _turn(image)
    image.load()
    image = _as_rgb(image if turn is None else image.transpose(turn), name)
    image.info.clear()
    return image


def read_ids(path: Path) -> np.ndarray:
    """Read the ids that a mask file holds: (H, W), uint8, or uint16 if it has more bits.

    Raises:
        UserError: as ``read_image``, or more than one channel, or ids that 16 bits do not hold.
    """
    with _readable(path), Image.open(path) as mask:
        if any(tile[3] in _SCALED for tile in mask.tile):
            raise UserError(f"{path}: a mask of 2 or 4 grey bits; save it with 8, or as a palette")
        mask.load()  # completely, so that a truncated file fails here
    if mask.mode not in ("1", "L", "P") and not mask.mode.startswith("I"):
        raise UserError(
            f"{path}: a mask has one channel of class ids, this one is {mask.mode}; "
            "convert its colours to ids"
        )
    # convert() would turn palette entries into grey; the entries' numbers are the ids.
    ids = np.asarray(mask)
    if ids.min() < 0 or ids.max() > 65535:
        raise UserError(f"{path}: ids go from {ids.min()} to {ids.max()}, not from 0 to 65535")
    return ids.astype(np.uint8 if ids.itemsize == 1 else np.uint16, copy=False)


def read_mask(path: Path, table: bytes | None = None) -> Image.Image:
    """Read class ids, 255 = ignored, as a picture of mode L.

    Args:
        path: the file.
        table: what its ids mean, the bytes of ``dataset.catalog.id_table``; ids without a meaning
            are ignored. None: they are class ids, and those above 255 are ignored.

    Raises:
        UserError: as ``read_ids``.
    """
    ids = read_ids(path)
    ids = np.minimum(ids, IGNORE) if table is None else np.frombuffer(table, np.int16)[ids]
    return Image.fromarray(ids.astype(np.uint8, copy=False))


def picture_size(path: Path) -> tuple[int, int]:
    """Read (height, width), upright, off a file's header; a ``UserError`` if it is unreadable."""
    with _readable(path), Image.open(path) as picture:
        return picture.size if _turn(picture) in _SIDEWAYS else picture.size[::-1]


def to_input(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Return an RGB picture as the network takes it: (3, H, W) float32, normalised."""
    return normalised(to_pixels(image), preprocessing)


def to_pixels(image: Image.Image) -> Tensor:
    """Return an RGB picture as (3, H, W) uint8."""
    return tf.pil_to_tensor(image).contiguous()  # planes now, as bytes, not later as floats


def normalised(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalise (..., 3, H, W) RGB, uint8 in 0-255 or float in [0, 1]; the result is float32."""
    mean, std = list(preprocessing.mean), list(preprocessing.std)
    return tf.normalize(tf.to_dtype(pixels, torch.float32, scale=True), mean, std)


def to_label(mask: Image.Image) -> Tensor:
    """Return a mask as (H, W) long."""
    return torch.from_numpy(np.asarray(mask).astype(np.int64))


def _as_rgb(image: Image.Image, name: str | Path) -> Image.Image:
    if image.mode == "F":
        raise UserError(
            f"{name}: holds floating-point numbers of unknown range; save it with 8 or 16 bits"
        )
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip to white
        values = np.asarray(image)
        if image.mode != "I" or values.max() > 255:  # 32 bits may hold 8
            values = values / 256
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """Return what turns a picture upright, by the EXIF orientation in its header; None: nothing."""
    if picture.format == "TIFF":  # Pillow turns these itself
        return None
    try:  # a PNG's own getexif decodes the picture
        return _TURNS.get(Image.Image.getexif(picture).get(ExifTags.Base.Orientation))
    except Exception:  # EXIF that is damaged counts as none
        return None


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn any error of Pillow into a ``UserError``."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; correct the list or dataset.root") from None
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError and their own
        reason = str(error).replace(repr(str(path)), "the file")
        raise UserError(
            f"{path}: cannot read this picture ({reason}); replace it or take it off the list"
        ) from error
