"""Evaluate checkpoints on their val list; or segment a folder of pictures; or export the network.

python eval.py outdir/demo/6_retrain/checkpoint.pth [section.key=value ...] [--save-masks DIR]
python eval.py outdir/demo/[16]_*/checkpoint.pth [--markdown] [--json FILE]
python eval.py outdir/demo/6_retrain/checkpoint.pth --images photos --out segmented
python eval.py outdir/demo/6_retrain/checkpoint.pth --export net.onnx
python eval.py outdir/demo/6_retrain/checkpoint.pth --export net.safetensors
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
from torch import Tensor

from dataset.lists import (
    Sample,
    find_pictures,
    is_same_list,
    mask_file,
    read_picture,
    read_val,
    readable,
)
from dataset.loader import whole_images
from model import Segmenter
from model.diagnosis import diagnose
from utils import checkpoint
from utils.config.schema import Config
from utils.device import Device, fixed_order
from utils.diagnosis import lay_out_diagnosis
from utils.distributed import broadcast, by_first, joined, merged
from utils.errors import Parser, UserError, exit_with_one_line
from utils.evaluation import confusion_counts, lay_out_ious, passes, validate
from utils.export import export
from utils.files import write_json
from utils.outputs import Output, refuse_outputs
from utils.panels import save_legend, save_mask, save_overlay
from utils.run.folder import read_kept
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


def segment(net: Segmenter, pictures: Path, out: Path) -> tuple[int, list[str]]:
    """Segment the pictures below a folder: masks, overlays and a legend.

    Returns:
        How many; and what is wrong with those that cannot be read.
    """
    samples, broken = readable(find_pictures(pictures, net.pixels))
    one_by_one = net.config.inference.model_copy(update={"batch_size": 1})
    config = net.config.model_copy(update={"inference": one_by_one})
    loader = whole_images(config, samples, net.preprocessing)
    for batch in passes(loader, net.device, "segmenting"):
        (ids,), _ = net.segment(batch.image)
        ids, sample = ids.cpu().numpy(), samples[int(batch.index)]
        save_mask(mask_file(out / "masks", sample), ids, net.palette)
        overlay = mask_file(out / "overlays", sample).with_suffix(".jpg")
        save_overlay(overlay, read_picture(sample), ids, net.palette)
    legend = list(zip(net.classes, net.colours, strict=True))
    by_first(save_legend)(out / "legend.png", legend)
    return len(samples), broken


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


def refuse_places(arguments: argparse.Namespace, configs: Mapping[str, Config]) -> None:
    """Refuse to write where files are read, or over a run's or others' files.

    Args:
        arguments: of the command line.
        configs: by the name of their checkpoint or run folder.
    """
    read = {f"dataset.root of {name}": configs[name].dataset.root for name in configs}
    read |= {f"checkpoint {name}": name for name in configs}
    read |= {name: getattr(arguments, name[2:]) for name in ("--images", "--config", "--diagnose")}
    written = [
        Output("--save-masks", arguments.save_masks),
        Output("--json", arguments.json, [".json"]),
    ]
    if arguments.export is not None:
        suffix = arguments.export.suffix
        written.append(Output("--export", arguments.export, [suffix] if suffix else []))
    if arguments.out is not None:
        folders = ("masks", "overlays")
        written += [Output("--out", arguments.out / folder) for folder in folders]
    refuse_outputs(
        [each for each in written if each.path is not None],
        {name: Path(place) for name, place in read.items() if place is not None},
    )


def main() -> None:
    """Evaluate, segment pictures, or export."""
    with joined(), fixed_order():
        run(read_arguments())


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, segment or export as the command line says; rank 0 prints."""
    say = by_first(print)
    if arguments.diagnose is not None:
        config = read_kept(arguments.checkpoint, arguments.settings)
        refuse_places(arguments, {arguments.checkpoints[0]: config})
        device = Device(config.device, config.precision)
        found = diagnose(arguments.checkpoint, config, device, arguments.diagnose)
        say(lay_out_diagnosis(found))
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
    refuse_places(arguments, {name: each.config for name, each in nets.items()})
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
    say(lay_out_ious(results))
    if arguments.json is not None:
        stage = {"miou": results["miou"], "epoch": net.origin.get("epoch")}
        stages = {str(net.origin.get("stage", "checkpoint")): stage}
        by_first(write_json)(arguments.json, {"name": net.config.name, **results, "stages": stages})


if __name__ == "__main__":
    exit_with_one_line(main)
