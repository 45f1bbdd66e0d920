"""Pictures: masks in colour, overlays, legends, and predictions side by side."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import DataLoader

from utils import Preprocessing
from utils.distributed import by_first, merged
from utils.evaluation import Predictor, passes
from utils.files import write_atomically

Entry = tuple[str, tuple[int, int, int]]  # of a legend: class name and colour
_MARGIN, _LINE = 6, 18  # pixels
_JPEG = 65_500  # pixels, the longest side


class Classes(Protocol):
    """Names and colours by class id."""

    classes: Sequence[str]
    colours: Sequence[tuple[int, int, int]]

    def palette(self) -> bytes:
        """768 bytes for pictures of mode P."""


def save_mask(path: Path, ids: np.ndarray, palette: bytes) -> None:
    """Write class ids, (H, W) uint8, as a PNG of 768 bytes of palette, atomically."""
    _save(in_colour(ids, palette), path)


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
    _save(picture, path, "JPEG", quality=92)


def overlay(image: Image.Image, ids: np.ndarray, palette: bytes) -> Image.Image:
    """Blend an RGB picture with the colours of its (H, W) uint8 class ids, half and half."""
    return Image.blend(image, in_colour(ids, palette).convert("RGB"), 0.5)


def save_legend(path: Path, legend: Sequence[Entry]) -> None:
    """Write class names beside their colours, as PNG, atomically."""
    _save(_legend(legend, width=480), path)


def draw_examples(
    path: Path,
    loader: DataLoader,
    predictors: Mapping[str, Predictor],
    kind: Classes,
    preprocessing: Preprocessing,
) -> None:
    """Write a panel of images, labels and predictions, as PNG. Collective.

    Args:
        path: where.
        loader: of the images.
        predictors: by column title.
        kind: classes and colours.
        preprocessing: of the loader's images.
    """
    rows = []  # of each batch
    device = next(iter(predictors.values())).device
    for batch in passes(loader, device, path.stem):
        size = tuple(batch.label.shape[-2:])
        ids = [predict(batch.image, size).argmax(dim=1) for predict in predictors.values()]
        rows.append({})
        for place, index in enumerate(batch.index.tolist()):
            masks = [mask[place].byte().cpu().numpy() for mask in (batch.label, *ids)]
            shown = [in_colour(mask, kind.palette()) for mask in masks]
            rows[-1][index] = [_as_picture(batch.image[place], preprocessing), *shown]
    pictures = [row for _, row in sorted(merged(rows).items())]
    legend = list(zip(kind.classes, kind.colours, strict=True))
    by_first(save_panel)(path, ["image", "label", *predictors], pictures, legend)


def _as_picture(image: Tensor, preprocessing: Preprocessing) -> Image.Image:
    """Undo the normalisation of a (3, H, W) image."""
    mean, std = (np.asarray(values)[:, None, None] for values in preprocessing[:2])
    values = (image.cpu().double().numpy() * std + mean) * 255
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def save_panel(
    path: Path,
    titles: Sequence[str],
    rows: Sequence[Sequence[Image.Image]],
    legend: Sequence[Entry],
    height: int = 144,
) -> None:
    """Write rows of pictures under column titles, over a legend of class colours.

    Args:
        path: where to write a PNG.
        titles: one a column.
        rows: the pictures of one image each.
        legend: class names and colours.
        height: of a row, in pixels.
    """
    rows = [[_to_height(picture, height) for picture in row] for row in rows]
    width = max(picture.width for row in rows for picture in row) + _MARGIN
    names = _legend(legend, width * len(titles))
    top, below = _MARGIN + _LINE, len(rows) * (height + _MARGIN) + names.height
    panel = Image.new("RGB", (width * len(titles) + _MARGIN, top + below), "white")
    for column, title in enumerate(titles):
        left = column * width + _MARGIN
        ImageDraw.Draw(panel).text((left, _MARGIN), title, "black", ImageFont.load_default())
        for number, row in enumerate(rows):
            panel.paste(row[column], (left, top + number * (height + _MARGIN)))
    panel.paste(names, (_MARGIN, panel.height - names.height))
    _save(panel, path)


def _save(picture: Image.Image, path: Path, kind: str = "PNG", **options: int) -> None:
    write_atomically(path, lambda partial: picture.save(partial, kind, **options))


def encoded(picture: Image.Image, kind: str = "PNG", **options: int) -> bytes:
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


def _legend(entries: Sequence[Entry], width: int) -> Image.Image:
    """Swatches with names, as many in a line as fit."""
    font = ImageFont.load_default()
    picture = Image.new("RGB", (width, (len(entries) + 1) * _LINE), "white")
    draw, left, top = ImageDraw.Draw(picture), 0, 0
    for name, colour in entries:
        needed = round(font.getlength(name)) + 2 * _LINE + _MARGIN
        if left and left + needed > width:
            left, top = 0, top + _LINE
        draw.rectangle((left, top + 2, left + 12, top + 14), fill=colour, outline="black")
        draw.text((left + _LINE, top + 2), name, "black", font)
        left += needed
    return picture.crop((0, 0, width, top + _LINE + _MARGIN))
