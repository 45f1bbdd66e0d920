"""Evaluate checkpoints on their val list; or segment a folder of pictures; or export the network.

python eval.py outdir/demo/6_retrain/checkpoint.pth [section.key=value ...] [--save-masks DIR]
python eval.py outdir/demo/[16]_*/checkpoint.pth [--markdown] [--json FILE]
python eval.py outdir/demo/6_retrain/checkpoint.pth --images photos --out segmented
python eval.py outdir/demo/6_retrain/checkpoint.pth --export net.onnx
python eval.py outdir/demo/6_retrain/checkpoint.pth --export net.safetensors
python eval.py outdir/demo --diagnose data/demo/truth.txt [--json FILE]
"""

import argparse
import csv
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from dataset.catalog import describe
from dataset.lists import (
    Sample,
    Splits,
    find_faults,
    find_pictures,
    mask_file,
    read_label,
    read_list,
    read_splits,
    read_val,
    readable,
)
from dataset.loader import Chance, whole_images
from dataset.query import Querier, QueryRule, build_query_index, read_selection
from dataset.reading import read_image, read_mask, to_label
from dataset.training import RetrainSample
from model import Segmenter
from model.cisc import anchor_weight
from model.ops.frozen import frozen
from model.retrieval import pooled
from train import (
    Neighbours,
    class_anchors,
    prototype_bank,
    trained_network,
    weight_by_bank,
    weight_by_image,
)
from utils import IGNORE, checkpoint
from utils.config.reading import read_config
from utils.config.schema import Config
from utils.device import Device
from utils.diagnosis import WeightQuality, rank_correlation
from utils.distributed import broadcast, by_first, joined, merged
from utils.errors import Parser, UserError, exit_with_one_line
from utils.evaluation import (
    ConfusionMatrix,
    Predictor,
    base_size,
    passes,
    resize_images,
    validate,
)
from utils.export import export
from utils.files import write_json
from utils.panels import save_legend, save_mask, save_overlay
from utils.run.stages import Stage, checkpoint_of
from utils.scores import Scores, boundary_overlap, compared, laid_out

_SEVERAL, _OF_LOADING = "several checkpoints", {"--config", "--reset-classifier"}
# Which options can be given together: each with those of its row, in either order. What a command
# would ignore is refused.
_TOGETHER = {
    "--diagnose": {"--json"},
    "--export": _OF_LOADING,
    "--images": _OF_LOADING | {"--out"},
    "--out": _OF_LOADING,
    "--save-masks": _OF_LOADING | {"--json"},
    "--markdown": _OF_LOADING | {"--json", _SEVERAL},
    "--json": _OF_LOADING | {_SEVERAL},
    "--config": {"--reset-classifier", _SEVERAL},
    "--reset-classifier": {_SEVERAL},
}


def evaluate(net: Segmenter, masks: Path | None = None) -> dict[str, Any]:
    """Score a network on its config's val list; write predicted masks below ``masks``."""
    config, samples = net.config, read_val(net.config.dataset)
    loader = whole_images(
        samples, config.inference, config.workers, preprocessing=net.preprocessing
    )

    def save(index: int, ids: Tensor) -> None:
        save_mask(mask_file(masks, samples[index]), ids.byte().cpu().numpy(), net.palette)

    keep = None if masks is None else save
    return validate(net.predict, loader, len(net.classes), keep).report(net.classes)


@torch.inference_mode()
def scores_of(net: Segmenter, samples: Sequence[Sample]) -> Scores:
    """Score a network on every image of a list. Collective."""
    classes, rows = len(net.classes), []  # of each batch
    loader = whole_images(
        samples, net.config.inference, net.config.workers, preprocessing=net.preprocessing
    )
    for batch in passes(loader, net.device, "evaluating"):
        ids = net.predict(batch.image, tuple(batch.label.shape[-2:])).argmax(dim=1)
        rows.append({})
        for index, mask, label in zip(batch.index.tolist(), ids, batch.label, strict=True):
            matrix = ConfusionMatrix(classes, net.device.torch_device)
            matrix.update(mask, label)
            overlap = boundary_overlap(mask, label, classes)
            rows[-1][index] = matrix.counts.cpu().numpy(), overlap.cpu().numpy()
    confusion, boundary = zip(*(row for _, row in sorted(merged(rows).items())), strict=True)
    return Scores([sample.name for sample in samples], np.stack(confusion), np.stack(boundary))


def compare(nets: Mapping[str, Segmenter]) -> dict[str, Any]:
    """Compare networks, by the name of their checkpoint, on the val list of their configs.

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
        if [x.name for x in lists[other]] != [x.name for x in lists[first]]:
            raise UserError(
                f"{other}: is validated on other images than {first}; set dataset.val=LIST for both"
            )
    found = {name: scores_of(net, lists[name]) for name, net in nets.items()}
    return compared(found, nets[first].classes)


def segment(net: Segmenter, pictures: Path, out: Path) -> tuple[int, list[str]]:
    """Segment the pictures below a folder: masks, overlays and a legend.

    Returns:
        How many; and what is wrong with those that cannot be read.
    """
    samples, broken = readable(find_pictures(pictures))
    one_by_one = net.config.inference.model_copy(update={"batch_size": 1})
    loader = whole_images(samples, one_by_one, net.config.workers, preprocessing=net.preprocessing)
    for batch in passes(loader, net.device, "segmenting"):
        (ids,), _ = net.segment(batch.image)
        ids, sample = ids.cpu().numpy(), samples[int(batch.index)]
        save_mask(mask_file(out / "masks", sample), ids, net.palette)
        overlay = mask_file(out / "overlays", sample).with_suffix(".jpg")
        save_overlay(overlay, read_image(sample.image), ids, net.palette)
    legend = list(zip(net.classes, net.colours, strict=True))
    by_first(save_legend)(out / "legend.png", legend)
    return len(samples), broken


@torch.inference_mode()
def diagnose(run: Path, config: Config, device: Device, truth: Path) -> dict[str, Any]:
    """Judge a run's pseudo labels, weight rules and image scores by true masks; no training does.

    Args:
        run: its folder; stages that it does not have are left out.
        config: the run's.
        device: where the teacher of stage 1 runs.
        truth: a list of unlabeled images with masks.

    Returns:
        ``labels``: accuracy and IoU of stored labels by stage, over pixels that are not ignored,
        and the share of these; ``classes``: the same of the most probable classes of teacher 1, of
        the votes and of both, over all pixels; ``weights``: AUROC, calibration error, share of the
        weight on wrong pixels and calibration curve of every rule, for the teacher's most probable
        classes; ``rank_correlation`` of image scores and mIoU, None if undefined, absent without
        stage 3.

    Raises:
        UserError: the list names no unlabeled image with a mask; a mask that training would refuse.
    """
    kind, splits, root = describe(config.dataset), read_splits(config.dataset), config.dataset.root
    classes, unlabeled = len(kind.classes), {sample.name for sample in splits.unlabeled}
    listed = read_list(truth, Path(root), kind)
    samples = [sample for sample in listed if sample.mask and sample.name in unlabeled]
    if not samples:
        raise UserError(f"{truth}: names no unlabeled image of this run with a mask beside it")
    for fault in find_faults(Splits([], [], samples), kind):
        raise UserError(fault.line)
    labels, mious = {}, defaultdict(dict)  # by stage and image
    for stage in ("2_pseudo_label", "5_relabel"):
        matrix, valid = ConfusionMatrix(classes), 0
        for sample in samples:
            file = mask_file(run / stage / "masks", sample)
            if file.is_file():
                ids, label = to_label(read_mask(file)), to_label(read_label(sample))
                single = ConfusionMatrix(classes)
                single.update(ids[ids != IGNORE], label[ids != IGNORE])
                mious[stage][sample.name] = single.mean_iou()
                matrix.counts += single.counts
                valid += int((label != IGNORE).sum())
        if mious[stage]:
            share = matrix.counts.sum().item() / max(1, valid)
            found = {"images": len(mious[stage]), "share": share}
            labels[stage] = {**found, **matrix.report(kind.classes)}
    matrices, qualities = _judged(run, config, device, samples, splits)
    ranking, scores = {}, run / "3_select" / "unlabeled_scores.csv"
    if scores.is_file():
        _, *rows = csv.reader(scores.read_text("utf-8").splitlines())
        true = mious["2_pseudo_label"]
        known = [row for row in rows if math.isfinite(true.get(row[0], math.nan))]
        columns = [float(score) for _, score in known], [true[name] for name, _ in known]
        ranking["rank_correlation"] = rank_correlation(*map(torch.DoubleTensor, columns))
    return {
        "truth": str(truth),
        "images": len(samples),
        "labels": labels,
        "classes": {name: matrix.report(kind.classes) for name, matrix in matrices.items()},
        "weights": {name: quality.report() for name, quality in qualities.items()},
        **ranking,
    }


def diagnosis_text(found: dict[str, Any]) -> str:
    """Lay out what ``diagnose`` returns, without the curves."""
    lines = []
    for stage, labels in found["labels"].items():
        share = f"{labels['share']:.1%} of the pixels"
        lines += [f"labels of {stage}: {labels['images']} images, {share}", table(labels), ""]
    lines.append(f"{'most probable class':<20}{'mIoU':>8}{'pixel accuracy':>20}")
    for source, result in found["classes"].items():
        lines.append(f"{source:<20}{result['miou']:>8.3f}{result['pixel_accuracy']:>20.3f}")
    lines += ["", f"{'weight':<20}{'AUROC':>8}{'calibration error':>20}{'weight on wrong':>18}"]
    for rule, quality in found["weights"].items():
        numbers = [quality[key] for key in ("auroc", "calibration_error", "weight_on_wrong")]
        lines.append("{:<20}{:>8.3f}{:>20.3f}{:>18.3f}".format(rule, *numbers))
    if "rank_correlation" in found:
        correlation = found["rank_correlation"]
        shown = "undefined" if correlation is None else f"{correlation:.3f}"
        lines += ["", f"rank correlation of image scores and mIoU: {shown}"]
    return "\n".join(lines)


def _judged(
    run: Path, config: Config, device: Device, samples: Sequence[Sample], splits: Splits
) -> tuple[dict[str, ConfusionMatrix], dict[str, WeightQuality]]:
    """Judge teacher 1, votes and both; and every weight of the teacher's most probable classes.

    The teacher sees the views of ``pseudo_label``. Queries are those of stages 4 and 6.
    """
    stage = Stage("diagnosis", run, config, device, log=None, watch=None)
    teacher = frozen(trained_network(config, checkpoint_of(run / "1_supervised")), device)
    settings, preprocessing = config.inference, teacher.preprocessing
    kind, chance = describe(config.dataset), Chance(config.seed, "diagnosis")
    anchors, bank = (
        make(stage, teacher, splits.labeled) for make in (class_anchors, prototype_bank)
    )
    ask = Neighbours(stage, splits.labeled) if config.pseudo_label.neighbours else None
    rule, selected = QueryRule.of(config.query, kind), run / "3_select"
    index = build_query_index(splits.labeled, rule)
    if (selected / "stage.json").is_file():
        index = read_selection(selected, splits.unlabeled, kind.classes).index
    querier = Querier(splits.labeled, index, rule, config.augment)
    loader = whole_images(samples, settings, config.workers, preprocessing=preprocessing)
    predict = Predictor(teacher, device, settings, config.pseudo_label)
    matrices = defaultdict(partial(ConfusionMatrix, len(kind.classes)))
    qualities = defaultdict(WeightQuality)
    for batch in passes(loader, device, "diagnosis"):
        size, known = tuple(batch.label.shape[-2:]), batch.label != IGNORE
        opinions = {"teacher": predict(batch.image, size)}
        if ask is not None:
            opinions["votes"] = ask.votes(batch.image, size)
            adjustment = config.pseudo_label.adjustment
            opinions["both"] = pooled(*opinions.values(), ask.prior, adjustment)
        for name, maps in opinions.items():
            matrices[name].update(maps.argmax(dim=1).cpu(), batch.label.cpu())
        confidence, ids = opinions["teacher"].max(dim=1)
        base = base_size(batch.image.shape[-2:], settings.long_side)
        images = resize_images(batch.image, base, preprocessing.interpolation)
        queried = [
            querier.draw(
                samples[number].name, Image.fromarray(mask), chance.of(number), preprocessing
            )
            for number, mask in zip(batch.index.tolist(), ids.byte().cpu().numpy(), strict=True)
        ]
        queried = device.move(default_collate(queried))
        sample = RetrainSample(images, ids, None, None, None, queried)
        with device.autocast():
            features = teacher.extract(images)
            weights = {
                "confidence": confidence,
                "image": weight_by_image(features, sample, None, teacher),
                "bank": weight_by_bank(features, sample, None, bank),
                "anchors": anchor_weight(features, ids, anchors),
            }
        weights["confidence_anchors"] = confidence * weights["anchors"]
        for name, maps in list(opinions.items())[1:]:
            weights[f"probability by {name}"] = maps.gather(1, ids.unsqueeze(1)).squeeze(1)
        for name, weight in weights.items():
            qualities[name].update(weight[known].cpu(), (ids == batch.label)[known].cpu())
    names = broadcast(lambda: ([*matrices], [*qualities]))  # rank 0 has an image; others may not
    return tuple(
        {name: found[name].reduce() for name in own}
        for found, own in zip((matrices, qualities), names, strict=True)
    )


def table(results: dict[str, Any]) -> str:
    """Lay out IoU by class, mIoU and pixel accuracy, in percent."""
    rows = {**results["per_class_iou"], "mIoU": results["miou"]}
    rows["pixel accuracy"] = results["pixel_accuracy"]
    width = max(map(len, rows))
    shown = {name: "not seen" if v is None else f"{100 * v:8.2f}" for name, v in rows.items()}
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown.items())


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "words",
        nargs="+",
        metavar="checkpoint [checkpoint ...] [key=value ...]",
        help="of train.py, or of ST++, CISC-R, UniMatch; settings such as dataset.root=DIR",
    )
    parser.add_argument(
        "--diagnose", type=Path, metavar="LIST", help="judge a run folder by these true masks"
    )
    parser.add_argument("--config", help="instead of the config that the checkpoint holds")
    parser.add_argument("--save-masks", type=Path, metavar="DIR", help="write palette PNGs here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument(
        "--markdown", action="store_true", help="print Markdown, with the confusion matrix"
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="segment these pictures instead")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where --images writes")
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="write net.onnx, net.pt2, net.safetensors, or a folder for the Hugging Face hub",
    )
    parser.add_argument(
        "--reset-classifier", action="store_true", help="leave the checkpoint's classifier out"
    )
    arguments = parser.parse_intermixed_args()
    # A file may have a name with = in it.
    named = ["=" not in word or Path(word).exists() for word in arguments.words]
    pairs = list(zip(arguments.words, named, strict=True))
    arguments.checkpoints = [word for word, is_file in pairs if is_file]
    arguments.settings = [word for word, is_file in pairs if not is_file]
    if not arguments.checkpoints:
        raise UserError("name a checkpoint, such as outdir/demo/6_retrain/checkpoint.pth")
    arguments.checkpoint = Path(arguments.checkpoints[0])
    given = [key for key in _TOGETHER if getattr(arguments, key[2:].replace("-", "_"))]
    given += [_SEVERAL] * (len(arguments.checkpoints) > 1)
    for one, other in combinations(given, 2):
        if other not in _TOGETHER[one]:
            raise UserError(f"{one} and {other} do not go together; leave one of them out")
    if (arguments.images is None) != (arguments.out is None):
        raise UserError("--images and --out go together: pictures in, masks and overlays out")
    return arguments


def refuse_inputs(arguments: argparse.Namespace, root: Path) -> None:
    """Refuse to write where files are read: pictures, the data root, the checkpoint."""
    read = {"--images": arguments.images, "dataset.root": root, "checkpoint": arguments.checkpoint}
    written = [
        ("--save-masks", arguments.save_masks),
        ("--json", arguments.json),
        ("--export", arguments.export),
    ]
    if arguments.out is not None:
        written += [("--out", arguments.out / folder) for folder in ("masks", "overlays")]
    for (key, path), (other, place) in product(written, read.items()):
        if path is None or place is None:
            continue
        one, two = path.resolve(), place.resolve()
        if one.is_relative_to(two) or (other == "--images" and two.is_relative_to(one)):
            raise UserError(f"{key}: {path} would lie where {other} is read, {place}; change it")


def main() -> None:
    """Evaluate, segment pictures, or export."""
    deterministic = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with joined(), deterministic:
        run(read_arguments())


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, segment or export as the command line says; rank 0 prints."""
    say = by_first(print)
    if arguments.diagnose is not None:
        config = read_config(str(arguments.checkpoint / "config.yaml"), arguments.settings)
        refuse_inputs(arguments, Path(config.dataset.root))
        device = Device(config.device, config.precision)
        found = diagnose(arguments.checkpoint, config, device, arguments.diagnose)
        say(diagnosis_text(found))
        for file in filter(None, (arguments.checkpoint / "diagnosis.json", arguments.json)):
            by_first(write_json)(file, found)
        return
    nets = {
        name: Segmenter.load(
            name,
            arguments.settings,
            config=arguments.config,
            reset_classifier=arguments.reset_classifier,
        )
        for name in arguments.checkpoints
    }
    net = nets[arguments.checkpoints[0]]
    refuse_inputs(arguments, Path(net.config.dataset.root))
    if len(nets) > 1 or arguments.markdown:
        comparison = compare(nets)
        say(laid_out(comparison, arguments.markdown))
        if arguments.json is not None:
            by_first(write_json)(arguments.json, comparison)
        return
    if arguments.export is not None:
        if arguments.export.suffix in checkpoint.SUFFIXES:
            broadcast(net.save, arguments.export)
            say(f"{arguments.export}: weights and config")
        else:
            difference = broadcast(export, net.net, arguments.export)
            say(f"{arguments.export}: logits differ from the network's by {difference:.1e} at most")
        return
    if arguments.images is not None:
        count, broken = segment(net, arguments.images, arguments.out)
        say(f"{arguments.out}: {count} masks, {count} overlays, legend.png")
        if broken:
            say("\n".join([f"{len(broken)} pictures left out:", *broken]))
            sys.exit(1)
        return
    results = evaluate(net, arguments.save_masks)
    say(table(results))
    if arguments.json is not None:
        stage = {"miou": results["miou"], "epoch": net.origin.get("epoch")}
        stages = {str(net.origin.get("stage", "checkpoint")): stage}
        by_first(write_json)(arguments.json, {"name": net.config.name, **results, "stages": stages})


if __name__ == "__main__":
    exit_with_one_line(main)
