"""How many pixels change their class when several views are averaged below full size.

python tests/benchmarks/views.py CHECKPOINT [section.key=value ...] [--images 40]

Labels unlabeled images of the checkpoint's config as stages 2 and 5 do, with
``inference.average_at`` at 1 (exact), 1/2 and 1/4, and prints the share of equal pixels beside the
time an image takes.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.lists import read_splits
from dataset.loader import whole_images
from model.networks import load_frozen
from utils import checkpoint
from utils.config.reading import config_from
from utils.device import Device
from utils.evaluation import Predictor, iterate_batches

SHARES = (1.0, 0.5, 0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--images", type=int, default=40, help="every n-th, so many in all")
    typed = parser.parse_intermixed_args()
    content = checkpoint.load(typed.checkpoint)
    config = config_from(content["config"], str(typed.checkpoint), typed.settings)
    device = Device(config.device, config.precision)
    net = load_frozen(config, device, typed.checkpoint)
    unlabeled = read_splits(config.dataset).unlabeled
    samples = unlabeled[:: max(1, len(unlabeled) // typed.images)][: typed.images]
    predictors = {}
    for share in SHARES:
        settings = config.inference.model_copy(update={"average_at": share})
        predictors[share] = Predictor(net, device, settings, config.pseudo_label)
    equal, seconds, pixels = dict.fromkeys(SHARES, 0), dict.fromkeys(SHARES, 0.0), 0
    loader = whole_images(config, samples, net.preprocessing)
    for number, batch in enumerate(iterate_batches(loader, device, "views")):
        ids, size = {}, tuple(batch.label.shape[-2:])
        for share in SHARES[:: -1 if number % 2 else 1]:  # none is always the first, and cold
            start = time.perf_counter()
            ids[share] = predictors[share](batch.image, size).argmax(dim=1).cpu()
            seconds[share] += time.perf_counter() - start
        pixels += batch.label.numel()
        for share in SHARES:
            equal[share] += int((ids[share] == ids[1.0]).sum())
    count = len(samples)
    print(f"{count} images, scales {config.pseudo_label.scales}, {device}")
    print("| average_at | equal pixels | s an image |", "|---|---|---|", sep="\n")
    for share in SHARES:
        print(f"| {share} | {100 * equal[share] / pixels:.3f} % | {seconds[share] / count:.3f} |")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
