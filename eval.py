"""Evaluate a checkpoint: mIoU, IoU of every class, pixel accuracy; write its masks.

python eval.py outdir/demo/6_retrain/checkpoint.pth [section.key=value ...] [--save-masks DIR]
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from dataset.catalog import describe
from dataset.reading import read_image, read_mask
from dataset.segmentation import whole_images
from dataset.splits import Sample, mask_file, read_val
from model import build_model
from utils import checkpoint
from utils.config import Config
from utils.errors import UserError, exit_with_one_line
from utils.files import write_json
from utils.inference import Predictor
from utils.metrics import ConfusionMatrix
from utils.panels import in_colour, save_mask, save_panel
from utils.precision import Device
from utils.read_config import config_from, read_config
from utils.stage import checkpoint_of

EXAMPLES = 4  # validation images in a run's picture


def build_network(config: Config, pretrained: str | None) -> nn.Module:
    """Build the config's network with ``pretrained`` backbone weights, None for random ones."""
    num_classes = len(describe(config.dataset).classes)
    model = config.model
    return build_model(model.name, model.backbone, num_classes, model.output_stride, pretrained)


def predictions(
    net: nn.Module, samples: Sequence[Sample], config: Config, device: Device
) -> Iterator[tuple[Sample, Tensor, Tensor]]:
    """Yield (sample, predicted ids, label), both (H, W) at the label's size; each image once."""
    predictor = Predictor(net, device)
    loader = whole_images(samples, config.inference.long_side, config.workers)
    bar = tqdm(loader, "evaluating", disable=None, leave=False, unit="image")
    for sample, item in zip(samples, bar, strict=True):
        probabilities = predictor(item.image, tuple(item.label.shape[-2:]))
        yield sample, probabilities.argmax(dim=1)[0].cpu(), item.label[0]


def validate(
    net: nn.Module, samples: Sequence[Sample], config: Config, device: Device
) -> ConfusionMatrix:
    """Compare predictions with labels, each image at its label's own size."""
    matrix = ConfusionMatrix(len(describe(config.dataset).classes))
    for _, prediction, label in predictions(net, samples, config, device):
        matrix.update(prediction, label)
    return matrix


def report(matrix: ConfusionMatrix, config: Config) -> dict[str, Any]:
    """Return mIoU, pixel accuracy and IoU by class name, in [0, 1]; None for an unseen class."""
    values = [None if value != value else value for value in matrix.iou().tolist()]
    return {
        "miou": matrix.mean_iou(),
        "pixel_accuracy": matrix.pixel_accuracy(),
        "per_class_iou": dict(zip(describe(config.dataset).classes, values, strict=True)),
    }


def draw_examples(
    path: Path, samples: Sequence[Sample], config: Config, device: Device, *stages: Path
) -> None:
    """Draw a few validation images, their labels, and what the networks of stages make of them."""
    kind = describe(config.dataset)
    palette = kind.palette()
    chosen = samples[:: max(1, len(samples) // EXAMPLES)][:EXAMPLES]
    rows = [
        [read_image(s.image), in_colour(np.asarray(read_mask(s.mask)), palette)] for s in chosen
    ]
    for stage in stages:
        net = device.place(build_network(config, pretrained=None))
        checkpoint.load_weights(net, checkpoint_of(stage))
        seen = predictions(net, chosen, config, device)
        for row, (_, prediction, _) in zip(rows, seen, strict=True):
            row.append(in_colour(prediction.byte().numpy(), palette))
    titles = ["image", "label", *(stage.name for stage in stages)]
    save_panel(path, titles, rows, list(zip(kind.classes, kind.colours, strict=True)))


def evaluate(path: Path, config: Config, masks: Path | None) -> dict[str, Any]:
    """Evaluate a checkpoint on the config's val list, and write its masks if asked to."""
    device, samples = Device(config.device, config.precision), read_val(config.dataset)
    net = device.place(build_network(config, pretrained=None))
    checkpoint.load_weights(net, path)
    kind = describe(config.dataset)
    matrix = ConfusionMatrix(len(kind.classes))
    for sample, prediction, label in predictions(net, samples, config, device):
        matrix.update(prediction, label)
        if masks is not None:
            ids = prediction.byte().numpy()
            save_mask(mask_file(masks, sample), ids, kind.palette())
    return report(matrix, config)


def table(results: dict[str, Any]) -> str:
    """Lay out IoU by class, mIoU and pixel accuracy, in percent."""
    rows = [*results["per_class_iou"].items(), ("mIoU", results["miou"])]
    rows.append(("pixel accuracy", results["pixel_accuracy"]))
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        f"{name:<{width}}  {'not seen' if value is None else f'{100 * value:8.2f}'}"
        for name, value in rows
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a checkpoint.pth of train.py")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="such as dataset.root=DIR")
    parser.add_argument("--config", help="instead of the config that the checkpoint holds")
    parser.add_argument("--save-masks", type=Path, metavar="DIR", help="write palette PNGs here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    arguments = parser.parse_intermixed_args()
    content = checkpoint.load(arguments.checkpoint)
    if arguments.config is not None:
        config = read_config(arguments.config, arguments.settings)
    elif isinstance(content.get("config"), dict):
        config = config_from(content["config"], str(arguments.checkpoint), arguments.settings)
    else:
        raise UserError(f"{arguments.checkpoint}: holds no config; name one with --config")
    results = evaluate(arguments.checkpoint, config, arguments.save_masks)
    print(table(results))
    if arguments.json is not None:
        stage = {"miou": results["miou"], "epoch": content.get("epoch")}
        stages = {content.get("stage", "checkpoint"): stage}
        write_json(arguments.json, {"name": config.name, **results, "stages": stages})


if __name__ == "__main__":
    exit_with_one_line(main)
