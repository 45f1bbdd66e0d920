"""What networks are used for once they are trained: scores, comparisons, segmented pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset.catalog import dataset_info
from dataset.lists import (
    Sample,
    find_pictures,
    is_same_list,
    mask_file,
    read_label,
    read_picture,
    read_val,
    readable,
)
from dataset.loader import whole_images
from dataset.reading import read_mask, to_label
from model.segmenter import Segmenter
from utils import IGNORE
from utils.config.schema import Config
from utils.distributed import gather_dict, on_rank_zero
from utils.errors import UserError
from utils.evaluation import ConfusionMatrix, confusion_counts, iterate_batches, validate
from utils.files import write_atomically
from utils.panels import save_legend, save_mask, save_overlay
from utils.scores import Scores, boundary_overlap, compare_scores, group_images


def evaluate(net: Segmenter, masks: Path | None = None) -> dict[str, Any]:
    """Score a network on its config's val list; write predicted masks below ``masks``."""
    config, samples = net.config, read_val(net.config.dataset)
    loader = whole_images(config, samples, net.preprocessing)

    def save(index: int, ids: Tensor) -> None:
        save_mask(mask_file(masks, samples[index]), ids.byte().cpu().numpy(), net.palette)

    keep = None if masks is None else save
    groups = group_images([sample.name for sample in samples], config.dataset.groups)
    return validate(net.predict, loader, len(net.classes), keep, groups).report(net.classes)


@torch.inference_mode()
def scores_of(net: Segmenter, samples: Sequence[Sample]) -> Scores:
    """Score a network on every image of a list. Collective."""
    classes, rows = len(net.classes), []  # of each batch
    loader = whole_images(net.config, samples, net.preprocessing)
    for batch in iterate_batches(loader, net.device, "evaluating"):
        ids = net.predict(batch.image, tuple(batch.label.shape[-2:])).argmax(dim=1)
        counts = confusion_counts(ids, batch.label, classes)
        pairs = zip(ids, batch.label, strict=True)
        overlaps = torch.stack([boundary_overlap(*pair, classes) for pair in pairs])
        of_images = zip(counts.cpu().numpy(), overlaps.cpu().numpy(), strict=True)
        rows.append(dict(zip(batch.index.tolist(), of_images, strict=True)))
    confusion, boundary = zip(*(row for _, row in sorted(gather_dict(rows).items())), strict=True)
    return Scores([sample.name for sample in samples], np.stack(confusion), np.stack(boundary))


def compare(nets: Mapping[str, Segmenter]) -> dict[str, Any]:
    """Compare networks, by the name of their checkpoint, on the val list of their configs.

    Images are grouped as the first one's config says.

    Raises:
        UserError: they do not share their classes, or their configs name other images.
    """
    first, *others = nets
    lists = {name: read_val(net.config.dataset) for name, net in nets.items()}
    for other in others:
        if nets[other].classes != nets[first].classes:
            raise UserError(
                f"{other}: has other classes than {first}; compare networks of one task"
            )
        if not is_same_list(lists[first], lists[other]):
            raise UserError(
                f"{other}: is validated on other images than {first}, or other masks; set "
                "dataset.root=DIR or dataset.val=LIST for both"
            )
    pattern = nets[first].config.dataset.groups
    groups = group_images([sample.name for sample in lists[first]], pattern)
    found = {name: scores_of(net, lists[name]) for name, net in nets.items()}
    return compare_scores(found, nets[first].classes, groups=groups)


def evaluate_masks(config: Config, folder: Path) -> dict[str, Any]:
    """Score masks that any program has predicted for a config's val list.

    Args:
        config: names the list and its classes.
        folder: holds a mask of each image, under the image's name with the suffix .png: ids as in
            the label masks of the data set.

    Raises:
        UserError: a mask is missing, has another size, or no class where its label has one.
    """
    info, samples = dataset_info(config.dataset), read_val(config.dataset)
    groups = group_images([sample.name for sample in samples], config.dataset.groups)
    matrix = ConfusionMatrix(len(info.classes), groups=groups)
    for number, sample in enumerate(samples):
        file = mask_file(folder, sample)
        if not file.is_file():
            raise UserError(
                f"{file}: no such file; --masks names a folder with a mask of each image of "
                "dataset.val, under its name in that list"
            )
        predicted, label = read_mask(file, info.table().tobytes()), read_label(sample)
        if predicted.size != label.size:
            raise UserError(f"{file}: its size differs from {sample.mask}; predict at full size")
        ids, true = to_label(predicted), to_label(label)
        if (ids[true != IGNORE] >= len(info.classes)).any():
            raise UserError(f"{file}: holds 255 or no class's id where {sample.mask} is labeled")
        matrix.update(ids[None], true[None], [number])
    return matrix.report(info.classes)


def segment(
    net: Segmenter, pictures: Path, out: Path, save: str | None = None
) -> tuple[int, list[str]]:
    """Segment pictures: masks, overlays and a legend.

    Args:
        net: the network.
        pictures: a file, a folder or a pattern.
        out: gets the folders ``masks`` and ``overlays``.
        save: 'confidence', the probability of the most probable class as PNGs of 16 bits, 65535
            for 1; 'probabilities', of all classes as .npy files, (C, H, W) float32, which sum to 1
            over C; in a folder of that name. None: neither.

    Returns:
        How many; and what is wrong with those that cannot be read.
    """
    samples, broken = readable(find_pictures(pictures, net.pixels))
    one_by_one = net.config.inference.model_copy(update={"batch_size": 1})
    config = net.config.model_copy(update={"inference": one_by_one})
    loader = whole_images(config, samples, net.preprocessing)
    for batch in iterate_batches(loader, net.device, "segmenting"):
        probabilities = net.predict(batch.image, tuple(batch.image.shape[-2:]))[0]
        ids = probabilities.argmax(dim=0).byte().cpu().numpy()
        sample = samples[int(batch.index)]
        if save is not None:
            save_probabilities(mask_file(out / save, sample), probabilities.cpu(), save)
        save_mask(mask_file(out / "masks", sample), ids, net.palette)
        overlay = mask_file(out / "overlays", sample).with_suffix(".jpg")
        save_overlay(overlay, read_picture(sample), ids, net.palette)
    legend = list(zip(net.classes, net.colours, strict=True))
    on_rank_zero(save_legend)(out / "legend.png", legend)
    return len(samples), broken


def save_probabilities(path: Path, probabilities: Tensor, what: str) -> None:
    """Write (C, H, W) probabilities of a picture as ``segment`` says."""
    if what == "confidence":
        highest = (probabilities.amax(dim=0).numpy() * 65535).round().astype(np.uint16)
        write_atomically(path, lambda place: Image.fromarray(highest).save(place, "PNG"))
        return

    def write(place: Path) -> None:
        with place.open("wb") as file:  # np.save would add a suffix to a path
            np.save(file, probabilities.numpy())

    write_atomically(path.with_suffix(".npy"), write)
