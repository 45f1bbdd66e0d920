"""What stage 3 keeps: class anchors, reliability, the more reliable half (sections 7 and 8).

With the network of stage 1 in eval mode on whole images: the anchor of a class is the mean of its
prototypes over labeled images; an image is reliable where its classes look like their anchors. The
more reliable share of the unlabeled images goes to stage 4; where retraining queries partners, the
more reliable share of each class's labeled images stays in the query index. ST++'s rule, agreement
with earlier checkpoints, ranks images in place of the anchors where ``select.score`` says so.

Stage 3 of ``train.py`` calls ``select``; ``write_selection`` and ``read_selection`` are its files.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dataset.catalog import dataset_info
from dataset.lists import Sample, Splits
from dataset.loader import whole_images
from dataset.query import QueryIndex
from model.cisc.maps import class_prototypes, image_reliability, reliability
from model.networks import load_frozen
from utils.config.batches import count_kept
from utils.config.schema import Config
from utils.device import Device
from utils.distributed import broadcast, gather_dict, gather_list
from utils.errors import UserError
from utils.evaluation import (
    ConfusionMatrix,
    Predictor,
    base_size,
    confusion_counts,
    iterate_batches,
    resize_images,
)
from utils.files import read_json, write_csv, write_json, write_text
from utils.run.folder import stage_again
from utils.run.stages import Report, Stage, checkpoint_of

EARLIER = (1 / 3, 2 / 3)  # of stage 1: checkpoints that stability compares (ST++)


@torch.inference_mode()
def select(
    stage: Stage,
    teacher: Path,
    splits: Splits,
    pseudo_labeled: Sequence[Sample],
    index: QueryIndex | None,
) -> Report:
    """Stage 3: which pseudo labels, and which partners of each class, are reliable.

    Args:
        stage: gets the files of ``write_selection``.
        teacher: folder of stage 1.
        splits: the images.
        pseudo_labeled: the unlabeled images with their pseudo labels.
        index: the partners of each class; None where retraining queries none.
    """
    config, settings = stage.config, stage.config.select
    images: list[dict[str, float]] = []  # of each batch
    partners: list[dict[tuple[int, str], float]] = []
    if settings.score == "stability":
        images.extend(_stability(stage, teacher, pseudo_labeled))
    if settings.score != "stability" or index is not None:
        net = load_frozen(config, stage.device, checkpoint_of(teacher))
        read = partial(features_of, config, stage.device, net)
        anchors = class_anchors(config, stage.device, net, splits.labeled)
        if index is not None:
            for names, features, label in read(splits.labeled, "labeled"):
                scores = reliability(features, label, anchors)
                rows = zip(names, scores.tolist(), strict=True)
                found = {(c, name): score for name, row in rows for c, score in enumerate(row)}
                partners.append({key: score for key, score in found.items() if score == score})
        if settings.score != "stability":
            for names, features, label in read(pseudo_labeled, "unlabeled"):
                scores = reliability(features, label, anchors)
                ranked = image_reliability(scores, settings.score == "mean").tolist()
                images.append(dict(zip(names, ranked, strict=True)))
    by_name, by_class = gather_dict(images), gather_dict(partners)
    scored = {sample.name: by_name[sample.name] for sample in splits.unlabeled}
    reliable = broadcast(write_selection, stage.folder, scored, settings.keep)
    if index is not None:
        kept = keep_reliable_partners(index, by_class, settings.keep)
        broadcast(
            write_partners, stage.folder, kept, by_class, dataset_info(config.dataset).classes
        )
    return {"images": reliable}


@torch.inference_mode()
def class_anchors(
    config: Config, device: Device, net: nn.Module, labeled: Sequence[Sample]
) -> Tensor:
    """Average the prototypes of each class over the labeled images that show it: (C, D) float32.

    NaN for a class that no label shows. Source: docs/method.md, section 7.
    """
    classes, sums = len(dataset_info(config.dataset).classes), []
    for _, features, label in features_of(config, device, net, labeled, "anchors"):
        prototypes, present = class_prototypes(features, label, classes)
        # (C, D + 1): the prototypes, and how many images have one
        sums.append(torch.cat([prototypes, present.unsqueeze(2)], dim=2).sum(dim=0).cpu())
    summed = torch.stack(gather_list(sums)).sum(dim=0).to(device.torch_device)
    return summed[:, :-1] / summed[:, -1:]


def features_of(
    config: Config, device: Device, net: nn.Module, samples: Sequence[Sample], title: str
) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Pass whole images through a network; yield names, features and labels by batch."""
    loader = whole_images(config, samples, net.preprocessing)
    for batch in iterate_batches(loader, device, title):
        size = base_size(batch.image.shape[-2:], config.inference.long_side)
        images = resize_images(batch.image, size, net.preprocessing.interpolation)
        with device.autocast():
            features = net.extract(images)
        yield [samples[index].name for index in batch.index.tolist()], features, batch.label


def _stability(
    stage: Stage, teacher: Path, pseudo_labeled: Sequence[Sample]
) -> Iterator[dict[str, float]]:
    """Score images by the mIoU of earlier checkpoints' predictions with the pseudo labels, summed.

    Source: ST++ (Yang et al., CVPR 2022, section 3.3). Deviates: predictions without views.
    """
    config, classes = stage.config, len(dataset_info(stage.config.dataset).classes)
    files = [teacher / f"earlier_{number}.pth" for number in range(1, len(EARLIER) + 1)]
    nets = [load_frozen(config, stage.device, file) for file in files]
    predictors = [Predictor(net, stage.device, config.inference) for net in nets]
    loader = whole_images(config, pseudo_labeled, nets[0].preprocessing)
    for batch in iterate_batches(loader, stage.device, f"{stage.name} unlabeled"):
        scores = dict.fromkeys((pseudo_labeled[index].name for index in batch.index), 0.0)
        for predict in predictors:
            ids = predict(batch.image, tuple(batch.label.shape[-2:])).argmax(dim=1)
            counts = confusion_counts(ids, batch.label, classes).cpu()
            for name, count in zip(scores, counts, strict=True):
                matrix = ConfusionMatrix(classes)
                matrix.counts += count
                miou = matrix.mean_iou()
                scores[name] += miou if math.isfinite(miou) else -math.inf  # all is ignored
        yield scores


def split_by_reliability(scores: Mapping[str, float], keep: float) -> tuple[list[str], list[str]]:
    """Return (reliable, unreliable) image names; ``keep`` is the share that is, rounded up.

    A higher score is more reliable; ties go by name.
    """
    ranked = sorted(scores, key=lambda name: (-scores[name], name))
    cut = count_kept(len(ranked), keep)
    return ranked[:cut], ranked[cut:]


def keep_reliable_partners(
    index: QueryIndex, scores: Mapping[tuple[int, str], float], keep: float
) -> QueryIndex:
    """Keep the more reliable share of each class's partners, rounded up, the only one at least.

    Scores are by (class id, image name), higher is more reliable; who has none is last.
    """
    kept = {}
    for label, names in index.items():
        found = {name: scores.get((label, name), -math.inf) for name in names}
        kept[label], _ = split_by_reliability(found, keep)
    return kept


class Selection(NamedTuple):
    """What stage 3 selects for retraining."""

    reliable: list[Sample]  # unlabeled images, best first
    unreliable: list[Sample]
    index: QueryIndex | None  # the partners that are kept; None where none are queried


def write_selection(folder: Path, images: Mapping[str, float], keep: float) -> int:
    """Write ``reliable.txt``, ``unreliable.txt`` and ``unlabeled_scores.csv``.

    Args:
        folder: gets the files.
        images: reliability of each unlabeled image.
        keep: share that counts as reliable.

    Returns:
        How many images are reliable.
    """
    halves = split_by_reliability(images, keep)
    for name, half in zip(("reliable", "unreliable"), halves, strict=True):
        write_text(folder / f"{name}.txt", "".join(f"{image}\n" for image in half))
    write_csv(folder / "unlabeled_scores.csv", ("image", "reliability"), images.items())
    return len(halves[0])


def write_partners(
    folder: Path,
    kept: QueryIndex,
    scores: Mapping[tuple[int, str], float],
    classes: Sequence[str],
) -> None:
    """Write ``query_index.json``, the partners kept, and ``labeled_scores.csv``, all of them.

    Args:
        folder: gets the files.
        kept: class id to names of labeled images.
        scores: reliability by (class id, labeled image).
        classes: names by class id.
    """
    write_json(folder / "query_index.json", {classes[label]: kept[label] for label in kept})
    rows = [(classes[label], name, score) for (label, name), score in scores.items()]
    write_csv(folder / "labeled_scores.csv", ("class", "image", "reliability"), rows)


def read_selection(folder: Path, unlabeled: Sequence[Sample], classes: Sequence[str]) -> Selection:
    """Read what ``write_selection`` and ``write_partners`` wrote.

    Raises:
        UserError: a file is gone, damaged, or of other images or classes.
    """
    by_name = {sample.name: sample for sample in unlabeled}
    file, index = folder / "query_index.json", None
    try:
        reliable, unreliable = (
            [by_name[name] for name in (folder / f"{half}.txt").read_text("utf-8").splitlines()]
            for half in ("reliable", "unreliable")
        )
        if file.is_file():
            named = read_json(file)
            index = {classes.index(name): list(map(str, x)) for name, x in named.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}: the selection is damaged, or of other images ({type(error).__name__}: "
            f"{error}); {stage_again('3_select')}"
        ) from error
    return Selection(reliable, unreliable, index)
