"""Evaluate a checkpoint on its val list; or segment a folder of pictures; or export the network.

python eval.py outdir/demo/6_retrain/checkpoint.pth [section.key=value ...] [--save-masks DIR]
python eval.py outdir/demo/6_retrain/checkpoint.pth --images photos --out segmented
python eval.py outdir/demo/6_retrain/checkpoint.pth --export net.onnx
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.catalog import describe
from dataset.lists import Sample, find_pictures, mask_file, read_label, read_val
from dataset.loader import WholeImage, photographs, whole_images
from dataset.reading import read_image, read_photograph
from model import build_model
from model.ops.frozen import frozen
from utils import checkpoint
from utils.config.reading import config_from, read_config
from utils.config.schema import Config, InferenceSection, PseudoLabelSection
from utils.device import Device
from utils.distributed import by_first, joined, merged, shared
from utils.errors import Parser, UserError, exit_with_one_line
from utils.evaluation import ConfusionMatrix, Predictor
from utils.export import export
from utils.files import write_json
from utils.panels import in_colour, save_legend, save_mask, save_overlay, save_panel
from utils.progress import no_bar
from utils.run.signals import shall_stop, stop_here
from utils.run.stages import checkpoint_of

Load = Callable[[Sequence[Sample], InferenceSection, int], DataLoader[WholeImage]]
EXAMPLES = 4  # validation images in a run's picture


def build_network(config: Config, pretrained: str | None) -> nn.Module:
    """Build the config's network with ``pretrained`` backbone weights, None for random ones."""
    num_classes = len(describe(config.dataset).classes)
    model = config.model
    return build_model(
        model.name, model.backbone, num_classes, model.output_stride, pretrained, model.stem
    )


def whole_batches(
    samples: Sequence[Sample], config: Config, device: Device, title: str, load: Load = whole_images
) -> Iterator[tuple[list[Sample], WholeImage]]:
    """Pass over whole images under a progress bar; yield samples and their batch, on the device.

    Of several processes each passes over its part; they have to come to the end together.
    """
    loader = load(samples, config.inference, config.workers)
    total = sum(map(len, loader.batch_sampler))
    with tqdm(desc=title, total=total, disable=no_bar(), leave=False, unit="image") as bar:
        for batch in loader:
            yield [samples[index] for index in batch.index.tolist()], device.move(batch)
            bar.update(len(batch.index))
            if shall_stop():
                break
    stop_here()


def predictor(
    net: nn.Module,
    device: Device,
    settings: InferenceSection,
    views: InferenceSection | PseudoLabelSection,
) -> Predictor:
    """Let a frozen network predict from several views, with the windows of ``settings``."""
    return Predictor(net, device, settings.window, views.scales, views.flip, settings.average_at)


def predictions(
    net: nn.Module,
    samples: Sequence[Sample],
    config: Config,
    device: Device,
    load: Load = whole_images,
) -> Iterator[tuple[list[Sample], Tensor, Tensor]]:
    """Yield (samples, predicted ids, labels), (B, H, W) at the labels' size; each image once."""
    predict = predictor(frozen(net, device), device, config.inference, config.inference)
    for chosen, batch in whole_batches(samples, config, device, "evaluating", load):
        yield chosen, predict(batch.image, tuple(batch.label.shape[-2:])).argmax(dim=1), batch.label


def validate(
    net: nn.Module,
    samples: Sequence[Sample],
    config: Config,
    device: Device,
    masks: Path | None = None,
) -> ConfusionMatrix:
    """Compare predictions with labels, at the labels' own size; write them below ``masks``.

    Collective: of several processes each predicts its part, and all get the matrix of the whole.
    """
    kind = describe(config.dataset)
    matrix = ConfusionMatrix(len(kind.classes), device.device)
    for chosen, ids, labels in predictions(net, samples, config, device):
        matrix.update(ids, labels)
        if masks is not None:
            for sample, mask in zip(chosen, ids.byte().cpu().numpy(), strict=True):
                save_mask(mask_file(masks, sample), mask, kind.palette())
    return matrix.reduce()


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
    rows = [[read_image(s.image), in_colour(np.asarray(read_label(s)), palette)] for s in chosen]
    for stage in stages:
        net = device.place(build_network(config, pretrained=None))
        checkpoint.load_weights(net, checkpoint_of(stage))
        seen = merged(
            [
                dict(zip((sample.name for sample in batch), ids.byte().cpu().numpy(), strict=True))
                for batch, ids, _ in predictions(net, chosen, config, device)
            ]
        )
        for row, sample in zip(rows, chosen, strict=True):
            row.append(in_colour(seen[sample.name], palette))
    titles = ["image", "label", *(stage.name for stage in stages)]
    by_first(save_panel)(path, titles, rows, list(zip(kind.classes, kind.colours, strict=True)))


def segment(net: nn.Module, config: Config, device: Device, pictures: Path, out: Path) -> int:
    """Segment the pictures below a folder: masks, overlays and a legend; return how many."""
    kind, samples = describe(config.dataset), find_pictures(pictures)
    palette = kind.palette()
    for (sample,), (prediction,), _ in predictions(net, samples, config, device, photographs):
        ids = prediction.byte().cpu().numpy()
        save_mask(mask_file(out / "masks", sample), ids, palette)
        overlay = mask_file(out / "overlays", sample).with_suffix(".jpg")
        save_overlay(overlay, read_photograph(sample.image), ids, palette)
    legend = list(zip(kind.classes, kind.colours, strict=True))
    by_first(save_legend)(out / "legend.png", legend)
    return len(samples)


def table(results: dict[str, Any]) -> str:
    """Lay out IoU by class, mIoU and pixel accuracy, in percent."""
    rows = [*results["per_class_iou"].items(), ("mIoU", results["miou"])]
    rows.append(("pixel accuracy", results["pixel_accuracy"]))
    width = max(len(name) for name, _ in rows)
    return "\n".join(
        f"{name:<{width}}  {'not seen' if value is None else f'{100 * value:8.2f}'}"
        for name, value in rows
    )


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
    if arguments.out is not None and arguments.out.resolve().is_relative_to(
        arguments.images.resolve()
    ):
        raise UserError("--out: lies in --images, where its masks would be pictures; name another")
    return arguments


def main() -> None:
    """Evaluate, segment pictures, or export."""
    with joined():
        run(read_arguments())


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line says; of several processes the first prints."""
    say = by_first(print)
    path, content = arguments.checkpoint, checkpoint.load(arguments.checkpoint)
    if arguments.config is not None:
        config = read_config(arguments.config, arguments.settings)
    elif isinstance(content.get("config"), dict):
        config = config_from(content["config"], str(path), arguments.settings)
    else:
        raise UserError(f"{path}: holds no config; name one with --config")
    device, net = Device(config.device, config.precision), build_network(config, pretrained=None)
    checkpoint.load_weights(net, path, arguments.reset_classifier)
    if arguments.export is not None:
        difference = shared(export, net, arguments.export)
        say(f"{arguments.export}: logits differ from the network's by {difference:.1e} at most")
        return
    net = device.place(net)
    if arguments.images is not None:
        count = segment(net, config, device, arguments.images, arguments.out)
        say(f"{arguments.out}: {count} masks, {count} overlays, legend.png")
        return
    matrix = validate(net, read_val(config.dataset), config, device, arguments.save_masks)
    results = report(matrix, config)
    say(table(results))
    if arguments.json is not None:
        stage = {"miou": results["miou"], "epoch": content.get("epoch")}
        stages = {content.get("stage", "checkpoint"): stage}
        by_first(write_json)(arguments.json, {"name": config.name, **results, "stages": stages})


if __name__ == "__main__":
    exit_with_one_line(main)
