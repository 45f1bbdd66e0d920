"""Predictions of the validation list that a run keeps: masks, scores by image, counts by class."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dataset.catalog import DatasetInfo
from dataset.lists import Sample, mask_file, read_picture
from dataset.reading import read_ids
from utils.distributed import broadcast, gather_dict, on_rank_zero
from utils.evaluation import ConfusionMatrix, confusion_counts, iterate_batches
from utils.files import in_background, write_csv, write_text
from utils.panels import in_colour, panel, save, save_mask

_EXAMPLES = 4  # images in a run's picture


def keep_predictions(
    folder: Path,
    stage: str,
    made_from: str,
    val: Sequence[Sample],
    kind: DatasetInfo,
    open_network: Callable[[], tuple[Callable[[Tensor, tuple[int, int]], Tensor], Any]],
) -> None:
    """Predict whole images by a stage's network; write what tells where it is right. Collective.

    Writes ``<stage>/masks/``, palette PNGs of class ids; ``<stage>/images.csv`` with mIoU and pixel
    accuracy, fractions, empty where no pixel counts; ``<stage>/confusion.csv``, pixels of a true
    class a row; and ``labels/``, the true masks as palette PNGs, 255 = ignored.

    Args:
        folder: of the predictions of a run.
        stage: its name.
        made_from: digest of its checkpoint; nothing is done if the files are of this one.
        val: the images, with masks.
        kind: classes and colours.
        open_network: returns a ``Predictor`` and a loader of the images.
    """
    place, classes, palette = folder / stage, len(kind.classes), kind.palette()
    if broadcast(_content, place / "made_from") == made_from:
        return
    predict, loader = open_network()
    counts, rows = ConfusionMatrix(classes), []  # rows of each batch
    with in_background(max(1, loader.num_workers)) as write:
        for batch in iterate_batches(loader, predict.device, f"predicting {stage}"):
            ids = predict(batch.image, tuple(batch.label.shape[-2:])).argmax(dim=1)
            of_images = confusion_counts(ids, batch.label, classes).cpu()
            masks, labels = (maps.byte().cpu().numpy() for maps in (ids, batch.label))
            rows.append({})
            columns = batch.index.tolist(), of_images, masks, labels
            for index, of_image, mask, label in zip(*columns, strict=True):
                single, sample = ConfusionMatrix(classes), val[index]
                single.counts += of_image
                counts.counts += of_image
                true = mask_file(folder / "labels", sample)
                for file, pixels in ((mask_file(place / "masks", sample), mask), (true, label)):
                    write(partial(save_mask, durable=False), file, pixels, palette)
                scores = single.mean_iou(), single.pixel_accuracy()
                shown = ["" if score != score else score for score in scores]
                paths = sample.image.absolute(), true.relative_to(folder).as_posix()
                rows[-1][index] = (sample.name, *shown, *paths)
    table = [row for _, row in sorted(gather_dict(rows).items())]
    columns = ("image", "miou", "pixel_accuracy", "picture", "label")
    on_rank_zero(write_csv)(place / "images.csv", columns, table)
    named = zip(kind.classes, counts.reduce().counts.tolist(), strict=True)
    header = ("class", *kind.classes)
    on_rank_zero(write_csv)(place / "confusion.csv", header, [(name, *row) for name, row in named])
    on_rank_zero(os.sync)()  # the masks are on the disk before the file that says so
    on_rank_zero(write_text)(place / "made_from", made_from)


def _content(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


@on_rank_zero
def draw_examples(
    path: Path, folder: Path, stages: Sequence[str], val: Sequence[Sample], kind: DatasetInfo
) -> None:
    """Draw a few validation images, their labels and the kept predictions of stages, as a PNG."""
    palette, rows = kind.palette(), []
    for sample in val[:: max(1, len(val) // _EXAMPLES)][:_EXAMPLES]:
        folders = [folder / "labels", *(folder / stage / "masks" for stage in stages)]
        masks = [read_ids(mask_file(place, sample)) for place in folders]
        shown = (in_colour(mask, palette) for mask in masks)
        rows.append([read_picture(sample), *shown])
    legend = list(zip(kind.classes, kind.colours, strict=True))
    save(panel(["image", "label", *stages], rows, legend), path)
