"""Evaluate checkpoints on their val list; or segment a folder of pictures; or export the network.

python eval.py outdir/demo/6_retrain/checkpoint.pth [section.key=value ...] [--save-masks DIR]
python eval.py outdir/demo/[16]_*/checkpoint.pth [--markdown] [--json FILE]
python eval.py outdir/demo/6_retrain/checkpoint.pth --images photos --out segmented
python eval.py outdir/demo/6_retrain/checkpoint.pth --export net.onnx
python eval.py outdir/demo/6_retrain/checkpoint.pth --export net.safetensors
python eval.py outdir/demo/6_retrain/checkpoint.pth --images 'a/*.jpg' --out b --save confidence
python eval.py a/6_retrain/checkpoint.pth b/6_retrain/checkpoint.pth --ensemble
python eval.py --masks predicted --config demo.yaml
python eval.py outdir/demo --diagnose data/demo/truth.txt [--json FILE]
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataset.catalog import describe
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
from model import Segmenter
from model.diagnosis import diagnose
from utils import IGNORE, checkpoint
from utils.config.reading import read_config
from utils.config.schema import Config
from utils.device import Device, fixed_order
from utils.diagnosis import lay_out_diagnosis
from utils.distributed import broadcast, by_first, joined, merged
from utils.errors import Parser, UserError, exit_with_one_line
from utils.evaluation import ConfusionMatrix, confusion_counts, lay_out_ious, passes, validate
from utils.export import export
from utils.files import write_atomically, write_json
from utils.outputs import Output, refuse_outputs
from utils.panels import save_legend, save_mask, save_overlay
from utils.run.folder import read_kept
from utils.scores import Scores, boundary_overlap, compared, laid_out

_SAVED = ("confidence", "probabilities")  # what --save writes
_READ = ("--images", "--masks", "--config", "--diagnose")  # options that name what is read
_SEVERAL, _OF_LOADING = "several checkpoints", {"--config", "--reset-classifier"}
# Which options can be given together: each with those of its row, in either order. What a command
# would ignore is refused.
_TOGETHER = {
    "--diagnose": {"--json"},
    "--export": _OF_LOADING,
    "--masks": {"--json", "--config"},
    "--images": _OF_LOADING | {"--out", "--save", "--ensemble"},
    "--out": _OF_LOADING | {"--save", "--ensemble"},
    "--save": _OF_LOADING | {"--ensemble"},
    "--save-masks": _OF_LOADING | {"--json", "--ensemble"},
    "--markdown": _OF_LOADING | {"--json", "--ensemble", _SEVERAL},
    "--json": _OF_LOADING | {"--ensemble", _SEVERAL},
    "--ensemble": _OF_LOADING,
    "--config": {"--reset-classifier", _SEVERAL},
    "--reset-classifier": {_SEVERAL},
}


def evaluate(net: Segmenter, masks: Path | None = None) -> dict[str, Any]:
    """Score a network on its config's val list; write predicted masks below ``masks``."""
    config, samples = net.config, read_val(net.config.dataset)
    loader = whole_images(config, samples, net.preprocessing)

    def save(index: int, ids: Tensor) -> None:
        save_mask(mask_file(masks, samples[index]), ids.byte().cpu().numpy(), net.palette)

    keep = None if masks is None else save
    return validate(net.predict, loader, len(net.classes), keep).report(net.classes)


@torch.inference_mode()
def scores_of(net: Segmenter, samples: Sequence[Sample]) -> Scores:
    """Score a network on every image of a list. Collective."""
    classes, rows = len(net.classes), []  # of each batch
    loader = whole_images(net.config, samples, net.preprocessing)
    for batch in passes(loader, net.device, "evaluating"):
        ids = net.predict(batch.image, tuple(batch.label.shape[-2:])).argmax(dim=1)
        counts = confusion_counts(ids, batch.label, classes)
        pairs = zip(ids, batch.label, strict=True)
        overlaps = torch.stack([boundary_overlap(*pair, classes) for pair in pairs])
        of_images = zip(counts.cpu().numpy(), overlaps.cpu().numpy(), strict=True)
        rows.append(dict(zip(batch.index.tolist(), of_images, strict=True)))
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
        if not is_same_list(lists[first], lists[other]):
            raise UserError(
                f"{other}: is validated on other images than {first}, or other masks; set "
                "dataset.root=DIR or dataset.val=LIST for both"
            )
    found = {name: scores_of(net, lists[name]) for name, net in nets.items()}
    return compared(found, nets[first].classes)


def evaluate_masks(config: Config, folder: Path) -> dict[str, Any]:
    """Score masks that any program has predicted for a config's val list.

    Args:
        config: names the list and its classes.
        folder: holds a mask of each image, under the image's name with the suffix .png: ids as in
            the label masks of the data set.

    Raises:
        UserError: a mask is missing, has another size, or no class where its label has one.
    """
    info, samples = describe(config.dataset), read_val(config.dataset)
    matrix = ConfusionMatrix(len(info.classes))
    for sample in samples:
        file = mask_file(folder, sample)
        predicted, label = read_mask(file, info.table().tobytes()), read_label(sample)
        if predicted.size != label.size:
            raise UserError(f"{file}: has not the size of {sample.mask}; score masks of full size")
        ids, true = to_label(predicted), to_label(label)
        if (ids[true != IGNORE] >= len(info.classes)).any():
            raise UserError(f"{file}: holds no class where {sample.mask} has one; predict them all")
        matrix.update(ids, true)
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
    for batch in passes(loader, net.device, "segmenting"):
        probabilities = net.predict(batch.image, tuple(batch.image.shape[-2:]))[0]
        ids = probabilities.argmax(dim=0).byte().cpu().numpy()
        sample = samples[int(batch.index)]
        if save is not None:
            save_probabilities(mask_file(out / save, sample), probabilities.cpu(), save)
        save_mask(mask_file(out / "masks", sample), ids, net.palette)
        overlay = mask_file(out / "overlays", sample).with_suffix(".jpg")
        save_overlay(overlay, read_picture(sample), ids, net.palette)
    legend = list(zip(net.classes, net.colours, strict=True))
    by_first(save_legend)(out / "legend.png", legend)
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


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "words",
        nargs="*",
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
    parser.add_argument("--ensemble", action="store_true", help="average the checkpoints")
    parser.add_argument(
        "--masks", type=Path, metavar="DIR", help="score these masks instead, with --config"
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="PLACE",
        help="segment pictures instead: a file, a folder, or a pattern in quotes",
    )
    parser.add_argument("--save", choices=_SAVED, help="of --images: write these too")
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
    if arguments.masks is None and not arguments.checkpoints:
        raise UserError("name a checkpoint, such as outdir/demo/6_retrain/checkpoint.pth")
    arguments.checkpoint = Path(arguments.checkpoints[0]) if arguments.checkpoints else None
    given = [key for key in _TOGETHER if getattr(arguments, key[2:].replace("-", "_"))]
    several = len(arguments.checkpoints) > 1 and not arguments.ensemble
    given += [_SEVERAL] * several
    for one, other in combinations(given, 2):
        if other not in _TOGETHER[one]:
            raise UserError(f"{one} and {other} do not go together; leave one of them out")
    if arguments.masks is not None and (arguments.checkpoints or arguments.config is None):
        raise UserError("--masks: takes --config FILE and no checkpoint")
    if arguments.save is not None and arguments.images is None:
        raise UserError("--save: goes with --images")
    if (arguments.images is None) != (arguments.out is None):
        raise UserError("--images and --out go together: pictures in, masks and overlays out")
    return arguments


def refuse_places(arguments: argparse.Namespace, configs: Mapping[str, Config]) -> None:
    """Refuse to write where files are read, or over a run's or others' files.

    Args:
        arguments: of the command line.
        configs: by the name of their checkpoint or run folder.
    """
    read = {f"dataset.root of {name}": configs[name].dataset.root for name in configs}
    read |= {f"checkpoint {name}": name for name in configs}
    read |= {name: getattr(arguments, name[2:]) for name in _READ}
    written = [
        Output("--save-masks", arguments.save_masks),
        Output("--json", arguments.json, [".json"]),
    ]
    if arguments.export is not None:
        suffix = arguments.export.suffix
        written.append(Output("--export", arguments.export, [suffix] if suffix else []))
    if arguments.out is not None:
        folders = ("masks", "overlays", *_SAVED)
        written += [Output("--out", arguments.out / folder) for folder in folders]
    refuse_outputs(
        [each for each in written if each.path is not None],
        {name: Path(place) for name, place in read.items() if place is not None},
    )


def main() -> None:
    """Evaluate, segment pictures, or export."""
    with joined(), fixed_order():
        arguments = read_arguments()
        others = judge_run if arguments.diagnose is not None else run
        (score_masks if arguments.masks is not None else others)(arguments)


def score_masks(arguments: argparse.Namespace) -> None:
    """Score the masks of a folder; rank 0 prints."""
    config = read_config(arguments.config, arguments.settings)
    refuse_places(arguments, {"of --config": config})
    results = broadcast(evaluate_masks, config, arguments.masks)
    by_first(print)(lay_out_ious(results))
    if arguments.json is not None:
        by_first(write_json)(arguments.json, {"name": str(arguments.masks), **results})


def judge_run(arguments: argparse.Namespace) -> None:
    """Judge a run's pseudo labels and weights by true masks; rank 0 prints."""
    config = read_kept(arguments.checkpoint, arguments.settings)
    refuse_places(arguments, {arguments.checkpoints[0]: config})
    device = Device(config.device, config.precision)
    found = diagnose(arguments.checkpoint, config, device, arguments.diagnose)
    by_first(print)(lay_out_diagnosis(found))
    for file in filter(None, (arguments.checkpoint / "diagnosis.json", arguments.json)):
        by_first(write_json)(file, found)


def load_networks(arguments: argparse.Namespace) -> dict[str, Segmenter]:
    """Load the checkpoints, or their average, by name; refuse outputs where they are read."""
    nets = {
        name: Segmenter.load(
            name,
            arguments.settings,
            config=arguments.config,
            reset_classifier=arguments.reset_classifier,
        )
        for name in arguments.checkpoints
    }
    refuse_places(arguments, {name: net.config for name, net in nets.items()})
    if arguments.ensemble:
        return {" + ".join(nets): Segmenter.ensemble(list(nets.values()))}
    return nets


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, segment or export as the command line says; rank 0 prints."""
    say = by_first(print)
    nets = load_networks(arguments)
    net = next(iter(nets.values()))
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
        count, broken = segment(net, arguments.images, arguments.out, arguments.save)
        say(f"{arguments.out}: {count} masks, {count} overlays, legend.png")
        if broken:
            say("\n".join([f"{len(broken)} pictures left out:", *broken]))
            sys.exit(1)
        return
    results = evaluate(net, arguments.save_masks)
    say(lay_out_ious(results))
    if arguments.json is not None:
        stage = {"miou": results["miou"], "epoch": net.origin.get("epoch")}
        stages = {str(net.origin.get("stage", "checkpoint")): stage}
        by_first(write_json)(arguments.json, {"name": net.config.name, **results, "stages": stages})


if __name__ == "__main__":
    exit_with_one_line(main)
