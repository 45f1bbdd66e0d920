"""Judge a run's pseudo labels and weights by true masks, which no training reads.

``diagnose`` reads what the stages stored and lets teacher 1, the votes and the weights of
retraining judge the same images again; ``utils.diagnosis`` has the measures and lays the result
out.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import default_collate

from dataset.catalog import dataset_info
from dataset.lists import (
    Sample,
    Splits,
    find_faults,
    mask_file,
    read_label,
    read_list,
    read_splits,
)
from dataset.loader import RandomStreams, WholeImage, whole_images
from dataset.query import Querier, QueryRule, build_query_index
from dataset.reading import read_mask, to_label
from dataset.training import RetrainSample
from model.cisc.anchors import class_anchors, read_selection
from model.cisc.maps import class_region, cross_image_weight, masked_average_pooling, similarity_map
from model.cisc.pseudo_labels import PseudoLabeler
from utils import IGNORE
from utils.config.schema import Config
from utils.device import Device
from utils.diagnosis import WeightQuality, rank_correlation
from utils.distributed import broadcast
from utils.errors import UserError
from utils.evaluation import ConfusionMatrix, base_size, iterate_batches, resize_images
from utils.run.folder import read_scores, read_votes, stage_again
from utils.run.stages import checkpoint_of


@torch.inference_mode()
def diagnose(run: Path, config: Config, device: Device, truth: Path) -> dict[str, Any]:
    """Judge a run's pseudo labels, weights and image scores by true masks.

    Args:
        run: its folder; stages that it does not have are left out.
        config: the run's.
        device: where the teacher of stage 1 runs.
        truth: a list of unlabeled images with masks.

    Returns:
        ``votes``: how far they are believed, if there are any; ``labels``: accuracy and IoU of
        stored labels by stage, over pixels that are not ignored, and the share of these;
        ``classes``: the same of the most probable classes of teacher 1, of the votes and of both,
        over all pixels; ``weights``: AUROC, calibration error, share of the
        weight on wrong pixels and calibration curve of every rule, for the teacher's most probable
        classes; ``rank_correlation`` of image scores and mIoU, None if undefined, absent without
        stage 3.

    Raises:
        UserError: the list names no unlabeled image with a mask; a mask that training would refuse.
    """
    info, splits = dataset_info(config.dataset), read_splits(config.dataset)
    unlabeled = {sample.name for sample in splits.unlabeled}
    listed = read_list(truth, Path(config.dataset.root), info)
    samples = [sample for sample in listed if sample.mask and sample.name in unlabeled]
    if not samples:
        raise UserError(f"{truth}: names no unlabeled image of this run with a mask beside it")
    for fault in find_faults(Splits([], [], samples), info):
        raise UserError(fault.line)
    labels, mious = _score_labels(run, info.classes, samples)
    matrices, qualities = _judge(FinishedRun(run, config, device, splits), samples)
    ranking, scores = {}, read_scores(run)
    if scores:
        known = [name for name in scores if math.isfinite(mious.get(name, math.nan))]
        columns = [scores[name] for name in known], [mious[name] for name in known]
        ranking["rank_correlation"] = rank_correlation(*map(torch.DoubleTensor, columns))
    return {
        "truth": str(truth),
        **({"votes": read_votes(run / "2_votes")} if (run / "2_votes").is_dir() else {}),
        "images": len(samples),
        "labels": labels,
        "classes": {name: matrix.report(info.classes) for name, matrix in matrices.items()},
        "weights": {name: quality.report() for name, quality in qualities.items()},
        **ranking,
    }


def _score_labels(
    run: Path, classes: Sequence[str], samples: Sequence[Sample]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Score stored labels by stage; return also the mIoU of each image of stage 2."""
    labels, mious = {}, defaultdict(dict)  # by stage and image
    for stage in ("2_pseudo_label", "5_relabel"):
        matrix, valid = ConfusionMatrix(len(classes)), 0
        for sample in samples:
            file = mask_file(run / stage / "masks", sample)
            if file.is_file():
                ids, label = to_label(read_mask(file)), to_label(read_label(sample))
                if ids.shape != label.shape or (ids[ids != IGNORE] >= len(classes)).any():
                    raise UserError(f"{file}: is no mask of its image; {stage_again(stage)}")
                single = ConfusionMatrix(len(classes))
                single.update(ids[ids != IGNORE], label[ids != IGNORE])
                mious[stage][sample.name] = single.mean_iou()
                matrix.counts += single.counts
                valid += int((label != IGNORE).sum())
        if mious[stage]:
            share = matrix.counts.sum().item() / max(1, valid)
            found = {"images": len(mious[stage]), "share": share}
            labels[stage] = {**found, **matrix.report(classes)}
    return labels, mious["2_pseudo_label"]


class FinishedRun(NamedTuple):
    """A run and what its config names."""

    folder: Path
    config: Config
    device: Device
    splits: Splits


def _judge(
    run: FinishedRun, samples: Sequence[Sample]
) -> tuple[dict[str, ConfusionMatrix], dict[str, WeightQuality]]:
    """Judge teacher 1, votes and both; and every weight of the teacher's most probable classes."""
    config, device, info = run.config, run.device, dataset_info(run.config.dataset)
    file = checkpoint_of(run.folder / "1_supervised")
    votes = run.folder / "2_votes" if config.pseudo_label.neighbours else None
    labeler = PseudoLabeler(config, device, file, run.splits.labeled, votes)
    teacher = labeler.teacher
    anchors = class_anchors(config, device, teacher, run.splits.labeled)
    querier, streams = _querier(run), RandomStreams(config.seed, "diagnosis")
    matrices = defaultdict(partial(ConfusionMatrix, len(info.classes)))
    qualities = defaultdict(WeightQuality)
    for batch in iterate_batches(
        whole_images(config, samples, teacher.preprocessing), device, "diagnosis"
    ):
        judged = labeler(batch.image, tuple(batch.label.shape[-2:]))
        opinions = {"teacher": judged.teacher}
        if judged.votes is not None:
            opinions |= {"votes": judged.votes, "both": judged.both}
        for name, maps in opinions.items():
            matrices[name].update(maps.argmax(dim=1).cpu(), batch.label.cpu())
        confidence, ids = opinions.pop("teacher").max(dim=1)
        partners = [
            querier.draw(
                samples[number].name,
                Image.fromarray(mask),
                streams.of(number),
                teacher.preprocessing,
            )
            for number, mask in zip(batch.index.tolist(), ids.byte().cpu().numpy(), strict=True)
        ]
        partner = device.move(default_collate(partners))
        images = _at_base_size(batch, config, teacher)
        sample = RetrainSample(images, ids, None, None, None, partner)
        with device.autocast():
            weights = {"confidence": confidence, **_feature_weights(teacher, sample, anchors)}
        for name, maps in opinions.items():
            weights[f"probability by {name}"] = maps.gather(1, ids.unsqueeze(1)).squeeze(1)
        known = batch.label != IGNORE
        for name, weight in weights.items():
            qualities[name].update(weight[known].cpu(), (ids == batch.label)[known].cpu())
    names = broadcast(lambda: ([*matrices], [*qualities]))  # rank 0 has an image; others may not
    return tuple(
        {name: found[name].reduce() for name in own}
        for found, own in zip((matrices, qualities), names, strict=True)
    )


def _querier(run: FinishedRun) -> Querier:
    """Return what draws partners: from the index of stage 3, if it has one."""
    info, selected = dataset_info(run.config.dataset), run.folder / "3_select"
    rule = QueryRule.of(run.config.query, info)
    index = None
    if (selected / "stage.json").is_file():
        index = read_selection(selected, run.splits.unlabeled, info.classes).index
    index = build_query_index(run.splits.labeled, rule) if index is None else index
    return Querier(run.splits.labeled, index, rule, run.config.augment)


def _at_base_size(batch: WholeImage, config: Config, net: nn.Module) -> Tensor:
    size = base_size(batch.image.shape[-2:], config.inference.long_side)
    return resize_images(batch.image, size, net.preprocessing.interpolation)


def _feature_weights(
    teacher: nn.Module, sample: RetrainSample, anchors: Tensor
) -> Mapping[str, Tensor]:
    """Weigh pixels by the CISC map of the partner, and by similarity to their class's anchor."""
    features, label, partner = teacher.extract(sample.image), sample.pseudo_label, sample.partner
    region = class_region(partner.label, partner.shared_class)
    prototype = masked_average_pooling(teacher.extract(partner.image), region)
    size, anchored = label.shape[-2:], torch.ones_like(label, dtype=torch.float32)
    for class_id in anchors.isfinite().all(dim=1).nonzero().flatten().tolist():
        anchor = anchors[class_id].expand(len(label), -1)
        similar = similarity_map(features, anchor, size)
        anchored = torch.where(label == class_id, similar, anchored)
    agreement = cross_image_weight(features, prototype, label, partner.shared_class)
    return {"cisc_map": agreement, "class anchors": anchored}
