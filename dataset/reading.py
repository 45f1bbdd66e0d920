"""Images and masks from files, by Pillow; bands of TIFF files that it lacks, by tifffile."""

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
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
_SIDEWAYS = (5, 6, 7, 8)  # orientations that swap height and width
_SCALED = ("L;2", "L;4")  # raw modes whose values Pillow spreads over 0 to 255
_SAMPLES_PER_PIXEL = 277  # tag of TIFF
_COLOURS = ("RGB", "RGBA", "RGBX")
_PERCENTILES = (0.5, 99.5)  # of a picture's values, black and white for ``range: percentile``
IDS, COLOURS = 1 << 16, 1 << 24  # that a mask file can hold


class Pixels(NamedTuple):
    """How the values in picture files become red, green and blue: ``dataset.bands``, ``range``."""

    bands: tuple[int, int, int] | None = None  # numbers from 1; None: the file's own RGB or grey
    # Values that become 0 and 255; 'percentile': of each picture; None: by the number of bits.
    range: tuple[float, float] | str | None = None


class Traits(NamedTuple):
    """What a user should know of how a picture is read."""

    orientation: int  # by EXIF; 1: the picture is upright as it is stored
    bands: int  # of the file
    bands_read: int
    highest: int | None  # value of a picture of 16 bits that is cut down to 8; None: of no such


AS_STORED = Pixels()


def read_image(path: Path, pixels: Pixels = AS_STORED) -> Image.Image:
    """Read a picture of any mode as RGB, turned upright by its EXIF orientation, as viewers do.

    Raises:
        UserError: it cannot be read completely; or as ``upright``.
    """
    with _readable(path):
        try:
            with _opened(path) as image:
                return upright(image, path, pixels)
        except UnidentifiedImageError:
            values, orientation = _tiff_values(path)
            return _turn_upright(_as_rgb(values, pixels, path), orientation)


def upright(image: Image.Image, name: str | Path, pixels: Pixels = AS_STORED) -> Image.Image:
    """Return a copy of a picture as RGB, turned upright by the EXIF orientation that it carries.

    Args:
        image: of any mode; a copy carries no EXIF, so that it is not turned again.
        name: for the error.
        pixels: which of its values are red, green and blue.

    Raises:
        UserError: it holds floating-point numbers of unknown range, or not the bands to be read.
    """
    if pixels == AS_STORED and (image.mode in ("1", "L", "LA") or not _is_grey(image)):
        orientation = _orientation(image)
        image.load()
        rgb = image.convert("RGB")
    else:
        values, orientation = _values(image)
        rgb = _as_rgb(values, pixels, name)
    rgb.info.clear()
    return _turn_upright(rgb, orientation)


def examine(path: Path, pixels: Pixels = AS_STORED) -> Traits:
    """Decode a picture as ``read_image`` does, and return what it turns and leaves out."""
    with _readable(path):
        try:
            with _opened(path) as image:
                orientation, bands = _stored_orientation(image), _band_count(image)
                read = 1 if _is_grey(image) else 3
                colour_of_16_bits = _is_deep(image) and image.mode in _COLOURS
                rgb = upright(image, path, pixels)
                if image.mode in ("LA", "RGBA") and image.getextrema()[-1] == (255, 255):
                    bands -= 1  # opaque everywhere
                highest = None
                if colour_of_16_bits:  # Pillow has their upper 8 bits
                    highest = 256 * max(high for _, high in rgb.getextrema()) + 255
                elif image.mode.startswith("I") and (top := np.asarray(image).max()) > 255:
                    highest = int(top)
        except UnidentifiedImageError:
            values, orientation = _tiff_values(path)
            _as_rgb(values, pixels, path)
            bands, read, highest = values.shape[2], 3, None
            if values.dtype.kind in "ui" and values.max() > 255:
                highest = int(values.max())
    read = bands if pixels.bands else min(bands, read)
    return Traits(orientation, bands, read, highest if pixels.range is None else None)


def read_ids(path: Path, colours: bool = False) -> np.ndarray:
    """Read the ids that a mask file holds: (H, W), uint8, or uint16 if it has more bits.

    Three equal channels count as one, and so does an alpha channel that is opaque.

    Args:
        path: the file.
        colours: read 0xRRGGBB, uint32, in place of ids; grey and palettes have colours too.

    Raises:
        UserError: as ``read_image``, transparent pixels, channels that differ where ids are
            wanted, or ids that 16 bits do not hold.
    """
    with _readable(path), _opened(path) as mask:
        if any(tile[3] in _SCALED for tile in mask.tile):
            raise UserError(f"{path}: a mask of 2 or 4 grey bits; save it with 8, or as a palette")
        mask.load()  # completely, so that a truncated file fails here
    if mask.mode in ("LA", "RGBA"):
        if mask.getextrema()[-1][0] < 255:
            raise UserError(f"{path}: this mask has transparent pixels; save it without alpha")
        mask = mask.convert(mask.mode[:-1])
    if mask.mode not in ("1", "L", "P", "RGB") and not mask.mode.startswith("I"):
        raise UserError(
            f"{path}: a mask has one channel of class ids, or colours in RGB; this one is "
            f"{mask.mode}: save it as PNG"
        )
    if colours:
        channels = np.asarray(mask.convert("RGB"), np.uint32)
        return channels @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    # convert() would turn palette entries into grey; the entries' numbers are the ids.
    ids = np.asarray(mask)
    if mask.mode == "RGB":
        ids = _one_channel(ids, path)
    if ids.min() < 0 or ids.max() > 65535:
        raise UserError(f"{path}: ids go from {ids.min()} to {ids.max()}, not from 0 to 65535")
    return ids.astype(np.uint8 if ids.itemsize == 1 else np.uint16, copy=False)


def _one_channel(channels: np.ndarray, path: Path) -> np.ndarray:
    coloured = channels[(channels != channels[..., :1]).any(axis=2)]
    if len(coloured):
        raise UserError(
            f"{path}: this mask holds colours, such as #{coloured[0].tobytes().hex()}; say in "
            "dataset.class_map which class each is ('#ff0000': NAME, in quotes), or name CVAT's "
            "file: dataset.class_map=labelmap.txt"
        )
    return channels[..., 0]


def read_mask(path: Path, table: bytes | None = None) -> Image.Image:
    """Read class ids, 255 = ignored, as a picture of mode L.

    Args:
        path: the file.
        table: what its ids or colours mean, the bytes of ``dataset.catalog.id_table``; what has no
            meaning is ignored. None: they are class ids, and those above 255 are ignored.

    Raises:
        UserError: as ``read_ids``.
    """
    if table is None:
        ids = np.minimum(read_ids(path), IGNORE)
    else:
        meaning = np.frombuffer(table, np.int16)
        ids = meaning[read_ids(path, colours=len(meaning) == COLOURS)]
    return Image.fromarray(ids.astype(np.uint8, copy=False))


def picture_size(path: Path) -> tuple[int, int]:
    """Read (height, width), upright, off a file's header; a ``UserError`` if it is unreadable."""
    with _readable(path):
        try:
            with _opened(path) as picture:
                size, orientation = picture.size[::-1], _orientation(picture)
        except UnidentifiedImageError:
            with _tiff(path) as series:
                size = series.sizes["height"], series.sizes["width"]
                orientation = _tiff_orientation(series)
    return size[::-1] if orientation in _SIDEWAYS else size


def orientation_of(path: Path) -> int:
    """Return the EXIF orientation by which a picture is turned, 1 to 8; 1: not at all."""
    with _readable(path):
        try:
            with _opened(path) as picture:
                return _stored_orientation(picture)
        except UnidentifiedImageError:
            with _tiff(path) as series:
                return _tiff_orientation(series)


def to_input(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Return an RGB picture as the network takes it: (3, H, W) float32, normalised."""
    return normalise(to_pixels(image), preprocessing)


def to_pixels(image: Image.Image) -> Tensor:
    """Return an RGB picture as (3, H, W) uint8."""
    return tf.pil_to_tensor(image).contiguous()  # planes now, as bytes, not later as floats


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Normalise (..., 3, H, W) RGB, uint8 in 0-255 or float in [0, 1]; the result is float32."""
    mean, std = list(preprocessing.mean), list(preprocessing.std)
    return tf.normalize(tf.to_dtype(pixels, torch.float32, scale=True), mean, std)


def to_label(mask: Image.Image) -> Tensor:
    """Return a mask as (H, W) long."""
    return torch.from_numpy(np.asarray(mask).astype(np.int64))


def _as_rgb(values: np.ndarray, pixels: Pixels, name: str | Path) -> Image.Image:
    """Make RGB of the values of a file, (H, W, bands), of any type of numbers."""
    count, bands = values.shape[2], pixels.bands
    if bands is None and count > len("RGBA"):
        raise UserError(
            f"{name}: has {count} bands; say which three are red, green and blue, counted from 1, "
            "such as dataset.bands=[3,2,1]"
        )
    bands = bands or ((1, 2, 3) if count >= len("RGB") else (1, 1, 1))  # grey; others are alpha
    if max(bands) > count:
        raise UserError(
            f"{name}: has {count} bands, and dataset.bands={[*bands]} reads band {max(bands)}; "
            "name bands that it has"
        )
    values = values[:, :, [band - 1 for band in bands]]
    return Image.fromarray(_as_bytes(values, pixels.range, name))


def _as_bytes(
    values: np.ndarray, limits: tuple[float, float] | str | None, name: str | Path
) -> np.ndarray:
    """Map values to 0-255, by their limits or by the number of bits."""
    if limits is None:
        if values.dtype.kind == "f":
            raise UserError(
                f"{name}: holds floating-point numbers of unknown range; set "
                "dataset.range=[LOW,HIGH], the values that become black and white, or "
                "dataset.range=percentile"
            )
        if values.dtype == np.uint16 or (values.itemsize > 1 and values.max() > 255):
            values = values / 256  # convert() would clip it to white; 32 bits may hold 8
        return np.ascontiguousarray(values.clip(0, 255).astype(np.uint8))
    values = np.where(np.isfinite(values), values, np.nan).astype(np.float32)
    if limits == "percentile":
        known = values[~np.isnan(values)]
        limits = np.percentile(known, _PERCENTILES) if known.size else (0, 1)
    low, high = limits
    scaled = (values - low) * (255 / max(high - low, 1e-12))
    return np.nan_to_num(scaled).round().clip(0, 255).astype(np.uint8)


def _values(image: Image.Image) -> tuple[np.ndarray, int]:
    """Return the values of an opened picture, (H, W, bands), and how they are still to be turned.

    Pillow keeps the upper 8 bits of colours of 16, and the first three bands or the first page.
    """
    file, deep = getattr(image, "filename", ""), _is_deep(image) and image.mode in _COLOURS
    more = not image.palette and _band_count(image) > len(image.getbands())
    if file and image.format == "TIFF" and (deep or more):
        return _tiff_values(Path(file))
    orientation = _orientation(image)
    if deep:
        raise UserError(
            f"{file or 'image'}: Pillow reads the upper 8 of the 16 bits of its colours, so "
            "dataset.range and dataset.bands cannot be applied; convert it to TIFF"
        )
    image.load()
    if not _is_grey(image) and image.mode not in _COLOURS:
        image = image.convert("RGB")  # palettes, CMYK and the like
    values = np.asarray(image.convert("L") if image.mode == "1" else image)
    return values.reshape(*values.shape[:2], -1), orientation


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")


def _is_deep(image: Image.Image) -> bool:
    """Tell whether the file of a picture that is not loaded yet has 16 bits a value."""
    return any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def _band_count(image: Image.Image) -> int:
    """Return how many bands the file of an opened picture has; a palette stands for three."""
    if not _is_grey(image) and image.mode not in _COLOURS:
        return len("RGB")
    if image.format != "TIFF":
        return len(image.getbands())
    pages, size = image.n_frames, image.size
    if pages > 1:  # bands, if they have one size; else a pyramid or a thumbnail
        image.seek(1)
        pages = pages if image.size == size else 1
        image.seek(0)
    return image.tag_v2.get(_SAMPLES_PER_PIXEL, 1) * pages


def _turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation by which decoded values have to be turned."""
    # Pillow turns a TIFF itself.
    return 1 if picture.format == "TIFF" else _stored_orientation(picture)


def _stored_orientation(picture: Image.Image) -> int:
    """Return the EXIF orientation in the header of a picture that is not loaded yet."""
    try:  # a PNG's own getexif decodes the picture
        found = Image.Image.getexif(picture).get(ExifTags.Base.Orientation)
    except Exception:  # EXIF that is damaged counts as none
        return 1
    return found if found in _TURNS else 1


@contextmanager
def _tiff(path: Path) -> Iterator[Any]:
    """Open a file that Pillow does not know by tifffile: the series of its first picture."""
    try:
        import tifffile
    except ImportError:
        raise UserError(
            f"{path}: Pillow cannot read the bands or bits of this picture; if it is a TIFF, "
            "'pip install tifffile' reads it"
        ) from None
    try:
        file = tifffile.TiffFile(path)
    except tifffile.TiffFileError:
        raise ValueError("cannot identify the file") from None
    with file:
        yield file.series[0]


def _tiff_values(path: Path) -> tuple[np.ndarray, int]:
    """Return the values of a TIFF file, (H, W, bands), and how they are to be turned."""
    with _tiff(path) as series:
        axes = [series.axes.index("Y"), series.axes.index("X")]
        axes += [axis for axis in range(len(series.axes)) if axis not in axes]
        values = series.asarray().transpose(axes)
        return values.reshape(*values.shape[:2], -1), _tiff_orientation(series)


def _tiff_orientation(series: Any) -> int:
    tag = series.keyframe.tags.get(ExifTags.Base.Orientation)
    return int(tag.value) if tag is not None and tag.value in _TURNS else 1


_OPENING = Lock()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a picture of any size: Pillow's limit is against files that nobody chose."""
    with _OPENING:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with image:
        yield image


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn any error of Pillow into a ``UserError``; refuse a pipe, which would never end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is a folder, a device or a pipe")
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
