"""Pictures: masks in colour, overlays, legends, and predictions side by side."""

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


class Classes(Protocol):
    """Names and colours by class id."""

    classes: Sequence[str]
    colours: Sequence[tuple[int, int, int]]

    def palette(self) -> bytes:
        """768 bytes for pictures of mode P."""


def save_mask(path: Path, ids: np.ndarray, palette: bytes) -> None:
    """Write class ids as a palette PNG, atomically.

    Args:
        path: where.
        ids: (H, W) uint8 class ids, or 255.
        palette: 768 bytes, the colours of the ids.
    """
    picture = in_colour(ids, palette)
    write_atomically(path, lambda partial: picture.save(partial, "PNG"))


def in_colour(ids: np.ndarray, palette: bytes) -> Image.Image:
    """Return (H, W) uint8 ids as a picture of mode P."""
    picture = Image.fromarray(ids)
    picture.putpalette(palette)
    return picture


def save_overlay(
    path: Path, image: Image.Image, ids: np.ndarray, palette: bytes, strength: float = 0.5
) -> None:
    """Write an RGB picture with its classes laid over it, as JPEG, atomically.

    Args:
        path: where.
        image: the picture.
        ids: (H, W) uint8 class ids, of the picture's size.
        palette: 768 bytes, the colours of the ids.
        strength: opacity of the colours, in [0, 1].
    """
    picture = Image.blend(image, in_colour(ids, palette).convert("RGB"), strength)
    write_atomically(path, lambda partial: picture.save(partial, "JPEG", quality=92))


def save_legend(path: Path, legend: Sequence[Entry], width: int = 480) -> None:
    """Write class names beside their colours, as PNG, atomically."""
    picture = _legend(legend, width)
    write_atomically(path, lambda partial: picture.save(partial, "PNG"))


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
    palette, rows = kind.palette(), []
    device = next(iter(predictors.values())).device
    for batch in passes(loader, device, path.stem):
        size = tuple(batch.label.shape[-2:])
        ids = [predict(batch.image, size).argmax(dim=1) for predict in predictors.values()]
        for place, index in enumerate(batch.index.tolist()):
            masks = [mask[place].byte().cpu().numpy() for mask in (batch.label, *ids)]
            picture = _as_picture(batch.image[place], preprocessing)
            rows.append({index: (picture, [in_colour(mask, palette) for mask in masks])})
    columns = [[picture, *masks] for _, (picture, masks) in sorted(merged(rows).items())]
    titles = ["image", "label", *predictors]
    legend = list(zip(kind.classes, kind.colours, strict=True))
    by_first(save_panel)(path, titles, columns, legend)


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
        rows: pictures of one row show the same image.
        legend: class names and colours.
        height: of a row, in pixels.
    """
    shown = [[_to_height(picture, height) for picture in row] for row in rows]
    width = max(picture.width for row in shown for picture in row) + _MARGIN
    names = _legend(legend, width * len(titles))
    top = _MARGIN + _LINE
    panel = Image.new(
        "RGB",
        (width * len(titles) + _MARGIN, top + len(rows) * (height + _MARGIN) + names.height),
        "white",
    )
    draw, font = ImageDraw.Draw(panel), ImageFont.load_default()
    for column, title in enumerate(titles):
        draw.text((column * width + _MARGIN, _MARGIN), title, "black", font)
    for number, row in enumerate(shown):
        for column, picture in enumerate(row):
            panel.paste(picture, (column * width + _MARGIN, top + number * (height + _MARGIN)))
    panel.paste(names, (_MARGIN, panel.height - names.height))
    write_atomically(path, lambda partial: panel.save(partial, "PNG"))


def _to_height(picture: Image.Image, height: int) -> Image.Image:
    width = round(picture.width * height / picture.height)
    smooth = picture.mode == "RGB"
    resample = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return picture.resize((width, height), resample).convert("RGB")


def _legend(entries: Sequence[Entry], width: int) -> Image.Image:
    """Swatches with names, as many in a line as fit."""
    font = ImageFont.load_default()
    places, x, y = [], 0, 0
    for name, _ in entries:
        needed = round(font.getlength(name)) + 2 * _LINE + _MARGIN
        if x and x + needed > width:
            x, y = 0, y + _LINE
        places.append((x, y))
        x += needed
    picture = Image.new("RGB", (width, y + _LINE + _MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for (name, colour), (left, top) in zip(entries, places, strict=True):
        draw.rectangle((left, top + 2, left + 12, top + 14), fill=colour, outline="black")
        draw.text((left + _LINE, top + 2), name, "black", font)
    return picture
