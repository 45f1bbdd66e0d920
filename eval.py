"""Evaluate checkpoints on their val list; or segment a folder of pictures; or export the network.

python eval.py outdir/demo/6_retrain/checkpoint.pth [section.key=value ...] [--save-masks DIR]
python eval.py outdir/demo/[16]_*/checkpoint.pth [--markdown] [--json FILE] [--groups REGEX]
python eval.py outdir/demo/6_retrain/checkpoint.pth --images photos --out segmented
python eval.py outdir/demo/6_retrain/checkpoint.pth --export net.onnx
python eval.py outdir/demo/6_retrain/checkpoint.pth --export net.safetensors
python eval.py outdir/demo/6_retrain/checkpoint.pth --images 'a/*.jpg' --out b --save confidence
python eval.py a/6_retrain/checkpoint.pth b/6_retrain/checkpoint.pth --ensemble
python eval.py --masks predicted --config demo.yaml
python eval.py outdir/demo --diagnose data/demo/truth.txt [--json FILE]
"""

import argparse
import json
import sys
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

from dataset.lists import files_of
from model import Segmenter
from model.diagnosis import diagnose
from model.inference import compare, evaluate, evaluate_masks, segment
from utils import checkpoint
from utils.config.reading import read_config
from utils.config.schema import Config
from utils.device import Device, fixed_order
from utils.diagnosis import lay_out_diagnosis
from utils.distributed import broadcast, on_rank_zero, process_group
from utils.errors import Parser, UserError, exit_with_one_line, refuse_repeated
from utils.evaluation import lay_out_scores
from utils.export import export
from utils.files import write_json
from utils.outputs import Output, refuse_outputs
from utils.run.folder import read_kept
from utils.scores import lay_out_comparison

_SAVED = ("confidence", "probabilities")  # what --save writes
_READ = ("--images", "--masks", "--config", "--diagnose")  # options that name what is read
_SEVERAL, _OF_LOADING = "several checkpoints", {"--config", "--reset-classifier"}
# Which options can be given together: each with those of its row, in either order. What a command
# would ignore is refused.
_TOGETHER = {
    "--diagnose": {"--json"},
    "--export": _OF_LOADING,
    "--images": _OF_LOADING | {"--out", "--save", "--ensemble"},
    "--out": _OF_LOADING | {"--save", "--ensemble"},
    "--save": _OF_LOADING | {"--ensemble"},
    "--masks": {"--config", "--json", "--groups"},
    "--save-masks": _OF_LOADING | {"--json", "--ensemble", "--groups"},
    "--markdown": _OF_LOADING | {"--json", "--ensemble", "--groups", _SEVERAL},
    "--groups": _OF_LOADING | {"--json", "--ensemble", _SEVERAL},
    "--json": _OF_LOADING | {"--ensemble", _SEVERAL},
    "--ensemble": _OF_LOADING,
    "--config": {"--reset-classifier", _SEVERAL},
    "--reset-classifier": {_SEVERAL},
}


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    several = "checkpoint [checkpoint ...] [key=value ...]"
    of = "of train.py, or of ST++, CISC-R, UniMatch; settings such as dataset.root=DIR"
    add("words", nargs="*", metavar=several, help=of)
    add("--diagnose", type=Path, metavar="LIST", help="score a run's pseudo labels by true masks")
    add("--config", help="instead of the config that the checkpoint holds")
    add("--save-masks", type=Path, metavar="DIR", help="write palette PNGs here")
    add("--json", type=Path, metavar="FILE", help="write the numbers here")
    add("--markdown", action="store_true", help="print Markdown, with the confusion matrix")
    add("--groups", metavar="REGEX", help="score groups of images too, like dataset.groups=REGEX")
    add("--ensemble", action="store_true", help="average the checkpoints")
    add("--masks", type=Path, metavar="DIR", help="score these masks instead, with --config")
    pictures = "segment pictures instead: a file, a folder, or a pattern in quotes"
    add("--images", type=Path, metavar="PLACE", help=pictures)
    add("--save", choices=_SAVED, help="with --images: write these too")
    add("--out", type=Path, metavar="DIR", help="with --images: where to write")
    kinds = "write net.onnx, net.pt2, net.safetensors, or a folder for the Hugging Face hub"
    add("--export", type=Path, metavar="FILE", help=kinds)
    add("--reset-classifier", action="store_true", help="do not load the classifier")
    arguments = parser.parse_intermixed_args()
    # A file may have a name with = in it.
    named = ["=" not in word or Path(word).exists() for word in arguments.words]
    pairs = list(zip(arguments.words, named, strict=True))
    arguments.checkpoints = [word for word, is_file in pairs if is_file]
    arguments.settings = [word for word, is_file in pairs if not is_file]
    if arguments.groups is not None:
        arguments.settings.append(f"dataset.groups={json.dumps(arguments.groups)}")
    refuse_repeated(arguments.checkpoints)
    given = [key for key in _TOGETHER if getattr(arguments, key[2:].replace("-", "_"))]
    given += [_SEVERAL] * (len(arguments.checkpoints) > 1 and not arguments.ensemble)
    for one, other in combinations(given, 2):
        if other not in _TOGETHER[one]:
            raise UserError(f"{one} and {other} do not go together; leave one of them out")
    if arguments.masks is not None and (arguments.checkpoints or arguments.config is None):
        raise UserError("--masks: takes --config FILE and no checkpoint")
    if arguments.save is not None and arguments.images is None:
        raise UserError("--save: goes with --images")
    if (arguments.images is None) != (arguments.out is None):
        raise UserError("--images and --out go together: pictures in, masks and overlays out")
    if arguments.masks is not None:
        return arguments
    if not arguments.checkpoints:
        raise UserError("name a checkpoint, such as outdir/demo/6_retrain/checkpoint.pth")
    arguments.checkpoint = Path(arguments.checkpoints[0])
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
    if arguments.images is not None and not arguments.images.is_dir():
        # What fits a pattern may lie in --out: the user's pictures, or what an earlier call wrote.
        read |= {f"the picture {file} of --images": file for file in files_of(arguments.images)}
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
    with process_group(), fixed_order():
        arguments = read_arguments()
        if arguments.masks is not None:
            score_masks(arguments)
        elif arguments.diagnose is not None:
            judge_run(arguments)
        else:
            run(arguments)


def score_masks(arguments: argparse.Namespace) -> None:
    """Score the masks of a folder; rank 0 prints."""
    config = read_config(arguments.config, arguments.settings)
    refuse_places(arguments, {"--config": config})
    results = broadcast(evaluate_masks, config, arguments.masks)
    on_rank_zero(print)(lay_out_scores(results))
    if arguments.json is not None:
        on_rank_zero(write_json)(arguments.json, {"name": str(arguments.masks), **results})


def judge_run(arguments: argparse.Namespace) -> None:
    """Judge a run's pseudo labels and weights by true masks; rank 0 prints."""
    config = read_kept(arguments.checkpoint, arguments.settings)
    refuse_places(arguments, {arguments.checkpoints[0]: config})
    device = Device(config.device, config.precision)
    found = diagnose(arguments.checkpoint, config, device, arguments.diagnose)
    on_rank_zero(print)(lay_out_diagnosis(found))
    for file in filter(None, (arguments.checkpoint / "diagnosis.json", arguments.json)):
        on_rank_zero(write_json)(file, found)


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
    say = on_rank_zero(print)
    nets = load_networks(arguments)
    net = next(iter(nets.values()))
    if len(nets) > 1 or arguments.markdown:
        comparison = compare(nets)
        say(lay_out_comparison(comparison, arguments.markdown))
        if arguments.json is not None:
            on_rank_zero(write_json)(arguments.json, comparison)
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
    say(lay_out_scores(results))
    if arguments.json is not None:
        stage = {"miou": results["miou"], "epoch": net.origin.get("epoch")}
        stages = {str(net.origin.get("stage", "checkpoint")): stage}
        on_rank_zero(write_json)(
            arguments.json, {"name": net.config.name, **results, "stages": stages}
        )


if __name__ == "__main__":
    exit_with_one_line(main)
