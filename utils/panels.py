"""Pictures: masks in colour, overlays, legends, and predictions side by side."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils import Preprocessing
from utils.files import write_atomically

Picture = Image.Image | tuple[Image.Image, str]  # with a text in its corner
Entry = tuple[str, tuple[int, int, int]]  # of a legend: class name and colour
_MARGIN, _LINE = 6, 18  # pixels
_RED = (220, 30, 30)
_JPEG = 65_500  # pixels, the longest side


def save_mask(path: Path, ids: np.ndarray, palette: bytes, durable: bool = True) -> None:
    """Write class ids, (H, W) uint8, as a PNG of 768 bytes of palette, atomically."""
    picture = in_colour(ids, palette)
    write_atomically(path, lambda partial: picture.save(partial, "PNG"), durable)


def save_overlay(path: Path, image: Image.Image, ids: np.ndarray, palette: bytes) -> None:
    """Write an RGB picture under its half-transparent classes, as JPEG, atomically.

    A picture that is larger than JPEG can be (65,500 pixels) is shrunk.

    Args:
        path: where.
        image: the picture.
        ids: (H, W) uint8 class ids, of the picture's size.
        palette: 768 bytes, the colours of the ids.
    """
    picture = overlay(image, ids, palette)
    picture.thumbnail((_JPEG, _JPEG))
    save(picture, path, "JPEG", quality=92)


def overlay(image: Image.Image, ids: np.ndarray, palette: bytes) -> Image.Image:
    """Blend an RGB picture with the colours of its (H, W) uint8 class ids, half and half."""
    return Image.blend(image, in_colour(ids, palette).convert("RGB"), 0.5)


def save_legend(path: Path, legend: Sequence[Entry]) -> None:
    """Write class names beside their colours, as PNG, atomically."""
    save(_legend(legend, 480, ImageFont.load_default(), _LINE), path)


def as_picture(image: Tensor, preprocessing: Preprocessing) -> Image.Image:
    """Undo the normalisation of a (3, H, W) image."""
    mean, std = (np.asarray(values)[:, None, None] for values in preprocessing[:2])
    values = (image.cpu().double().numpy() * std + mean) * 255
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def in_grey(values: np.ndarray) -> Image.Image:
    """Return numbers in [0, 1], (H, W) float, as an RGB picture: 0 is black, 1 is white."""
    return Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")


def mark_places(image: Image.Image, places: np.ndarray) -> Image.Image:
    """Return an RGB picture in pale grey, with the places of (H, W) bool in red."""
    pale = Image.blend(image.convert("L"), Image.new("L", image.size, 255), 0.5).convert("RGB")
    pale.paste(_RED, mask=Image.fromarray(places.astype(np.uint8) * 255))
    return pale


def panel(
    titles: Sequence[str],
    rows: Sequence[Sequence[Picture]],
    legend: Sequence[Entry],
    height: int = 144,
    width: int | None = None,
    text: float | None = None,
) -> Image.Image:
    """Draw rows of pictures under column titles, over a legend of class colours.

    Args:
        titles: one a column.
        rows: the pictures of one image each; a pair of a picture and a text has that in its corner.
        legend: class names and colours.
        height: of a row, in pixels, where ``width`` does not make it less.
        width: of the widest picture at most; None: as wide as the height makes it.
        text: height of letters, in pixels; None: Pillow's default.
    """
    font = ImageFont.load_default(text)
    line = _LINE if text is None else round(1.6 * text)
    pairs = [[each if isinstance(each, tuple) else (each, "") for each in row] for row in rows]
    if width is not None:
        widest = max(picture.width / picture.height for row in pairs for picture, _ in row)
        height = min(height, round(width / widest))
    shown = [[(_to_height(picture, height), note) for picture, note in row] for row in pairs]
    width = max(picture.width for row in shown for picture, _ in row) + _MARGIN
    names = _legend(legend, width * len(titles), font, line)
    top, below = _MARGIN + line, len(rows) * (height + _MARGIN) + names.height
    drawn = Image.new("RGB", (width * len(titles) + _MARGIN, top + below), "white")
    draw = ImageDraw.Draw(drawn)
    for column, title in enumerate(titles):
        left = column * width + _MARGIN
        draw.text((left, _MARGIN), title, "black", font)
        for number, row in enumerate(shown):
            place, (picture, note) = (left, top + number * (height + _MARGIN)), row[column]
            drawn.paste(picture, place)
            if note:
                corner = draw.textbbox(place, f" {note} ", font)[2:]
                draw.rectangle((place, (corner[0], corner[1] + 2)), fill="white")
                draw.text(place, f" {note} ", "black", font)
    drawn.paste(names, (_MARGIN, drawn.height - names.height))
    return drawn


def save(picture: Image.Image, path: Path, kind: str = "PNG", **options: int) -> None:
    """Write a picture atomically, in a format of Pillow's with its options."""
    write_atomically(path, lambda partial: picture.save(partial, kind, **options))


def encode(picture: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    """Return the content of a picture's file."""
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def in_colour(ids: np.ndarray, palette: bytes) -> Image.Image:
    """Return class ids, (H, W) uint8, as a picture of mode P with 768 bytes of palette."""
    picture = Image.fromarray(ids)  # of mode L; a palette makes it P
    picture.putpalette(palette)
    return picture


def _to_height(picture: Image.Image, height: int) -> Image.Image:
    width = max(1, round(picture.width * height / picture.height))
    smooth = picture.mode == "RGB"
    resample = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return picture.resize((width, height), resample).convert("RGB")


def _legend(
    entries: Sequence[Entry],
    width: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    line: int,
) -> Image.Image:
    """Swatches with names, as many in a line as fit."""
    picture = Image.new("RGB", (width, (len(entries) + 1) * line), "white")
    draw, left, top, side = ImageDraw.Draw(picture), 0, 0, line - 6
    for name, colour in entries:
        needed = round(font.getlength(name)) + 2 * line + _MARGIN
        if left and left + needed > width:
            left, top = 0, top + line
        draw.rectangle((left, top + 2, left + side, top + 2 + side), fill=colour, outline="black")
        draw.text((left + line, top + 2), name, "black", font)
        left += needed
    return picture.crop((0, 0, width, top + line + _MARGIN))
