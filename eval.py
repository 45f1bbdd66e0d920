"""Evaluate a checkpoint on its val list; or segment a folder of pictures; or export the network.

python eval.py outdir/demo/6_retrain/checkpoint.pth [section.key=value ...] [--save-masks DIR]
python eval.py outdir/demo/6_retrain/checkpoint.pth --images photos --out segmented
python eval.py outdir/demo/6_retrain/checkpoint.pth --export net.onnx
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dataset.catalog import describe
from dataset.lists import find_pictures, mask_file, read_val
from dataset.loader import photographs, whole_images
from dataset.reading import read_photograph
from model import network_of
from model.ops.frozen import frozen
from utils import checkpoint
from utils.config.reading import config_from, read_config
from utils.config.schema import Config
from utils.device import Device
from utils.distributed import broadcast, by_first, joined
from utils.errors import Parser, UserError, exit_with_one_line
from utils.evaluation import Predictor, passes, validate
from utils.export import export
from utils.files import write_json
from utils.panels import save_legend, save_mask, save_overlay


def evaluate(
    net: nn.Module, config: Config, device: Device, masks: Path | None = None
) -> dict[str, Any]:
    """Score a network on the config's val list; write predicted masks below ``masks``."""
    kind, samples, settings = describe(config.dataset), read_val(config.dataset), config.inference
    loader = whole_images(samples, settings, config.workers, preprocessing=net.preprocessing)

    def save(index: int, ids: Tensor) -> None:
        save_mask(mask_file(masks, samples[index]), ids.byte().cpu().numpy(), kind.palette())

    predict = Predictor(frozen(net, device), device, settings)
    matrix = validate(predict, loader, len(kind.classes), None if masks is None else save)
    return matrix.report(kind.classes)


def segment(net: nn.Module, config: Config, device: Device, pictures: Path, out: Path) -> int:
    """Segment the pictures below a folder: masks, overlays and a legend; return how many."""
    kind, samples = describe(config.dataset), find_pictures(pictures)
    loader = photographs(samples, config.inference, config.workers, preprocessing=net.preprocessing)
    predict = Predictor(frozen(net, device), device, config.inference)
    for batch in passes(loader, device, "segmenting"):
        (ids,) = predict(batch.image, tuple(batch.label.shape[-2:])).argmax(dim=1)
        ids, sample = ids.byte().cpu().numpy(), samples[int(batch.index)]
        save_mask(mask_file(out / "masks", sample), ids, kind.palette())
        overlay = mask_file(out / "overlays", sample).with_suffix(".jpg")
        save_overlay(overlay, read_photograph(sample.image), ids, kind.palette())
    legend = list(zip(kind.classes, kind.colours, strict=True))
    by_first(save_legend)(out / "legend.png", legend)
    return len(samples)


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
    parser.add_argument("checkpoint", type=Path, help="of train.py, or of ST++, CISC-R, UniMatch")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="such as dataset.root=DIR")
    parser.add_argument("--config", help="instead of the config that the checkpoint holds")
    parser.add_argument("--save-masks", type=Path, metavar="DIR", help="write palette PNGs here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--images", type=Path, metavar="DIR", help="segment these pictures instead")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where --images writes")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write net.onnx or net.pt2")
    parser.add_argument(
        "--reset-classifier", action="store_true", help="leave the checkpoint's classifier out"
    )
    arguments = parser.parse_intermixed_args()
    if (arguments.images is None) != (arguments.out is None):
        raise UserError("--images and --out go together: pictures in, masks and overlays out")
    images, out = arguments.images, arguments.out
    if out is not None and out.resolve().is_relative_to(images.resolve()):
        raise UserError("--out: lies in --images, where its masks would be pictures; name another")
    return arguments


def main() -> None:
    """Evaluate, segment pictures, or export."""
    deterministic = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with joined(), deterministic:
        run(read_arguments())


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, segment or export as the command line says; rank 0 prints."""
    say = by_first(print)
    path, content = arguments.checkpoint, checkpoint.load(arguments.checkpoint)
    if arguments.config is not None:
        config = read_config(arguments.config, arguments.settings)
    elif isinstance(content.get("config"), dict):
        config = config_from(content["config"], str(path), arguments.settings)
    else:
        raise UserError(f"{path}: holds no config; name one with --config")
    device = Device(config.device, config.precision)
    net = network_of(config.model, len(describe(config.dataset).classes), pretrained=None)
    checkpoint.load_weights(net, path, arguments.reset_classifier)
    if arguments.export is not None:
        difference = broadcast(export, net, arguments.export)
        say(f"{arguments.export}: logits differ from the network's by {difference:.1e} at most")
        return
    net = device.place(net)
    if arguments.images is not None:
        count = segment(net, config, device, arguments.images, arguments.out)
        say(f"{arguments.out}: {count} masks, {count} overlays, legend.png")
        return
    results = evaluate(net, config, device, arguments.save_masks)
    say(table(results))
    if arguments.json is not None:
        stage = {"miou": results["miou"], "epoch": content.get("epoch")}
        stages = {content.get("stage", "checkpoint"): stage}
        by_first(write_json)(arguments.json, {"name": config.name, **results, "stages": stages})


if __name__ == "__main__":
    exit_with_one_line(main)
