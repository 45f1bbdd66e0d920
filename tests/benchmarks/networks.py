"""Print networks of the family: size, arithmetic, and speed here in each precision.

python tests/benchmarks/networks.py [--only timm] [--crop 321] [--batch 4] [--precision fp32 bf16]

GFLOP count the multiplications and additions of one forward pass of one image, two a
multiply-add. Images a second: the median of three after one warm-up, of a training step (forward,
backward, no update) and of the frozen network's forward pass.
"""

import argparse
import statistics
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model import build_model
from model.ops.frozen import freeze
from tests.benchmarks.timing import flop, seconds
from utils.device import Device

CLASSES = 21
NETWORKS = [  # network, encoder, output stride
    ("deeplabv3plus", "resnet18", 16),
    ("deeplabv3plus", "resnet50", 16),
    ("deeplabv3plus", "resnet101", 16),
    ("deeplabv3plus", "xception65", 16),
    ("pspnet", "resnet50", 16),
    ("deeplabv2", "resnet50", 16),
    ("deeplabv3plus", "timm/tf_efficientnet_lite0", 16),
    ("deeplabv3plus", "timm/mobilenetv3_large_100", 16),
    ("deeplabv3plus", "timm/convnext_tiny", 16),
    ("dpt", "timm/vit_tiny_patch16_224", 16),
    ("dpt", "timm/vit_small_patch14_dinov2.lvd142m", 16),
]


def mean_logit(device: Device, net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with device.autocast():
        return net(images).logits.mean()


def step(device: Device, net: nn.Module, images: torch.Tensor) -> None:
    mean_logit(device, net, images).backward()


forward = torch.inference_mode()(mean_logit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="networks whose name or encoder holds this")
    parser.add_argument("--crop", type=int, default=321)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", nargs="+", default=["auto"])
    typed = parser.parse_args()
    devices = [Device(typed.device, precision) for precision in typed.precision]
    print(f"{devices[0].torch_device}, {torch.get_num_threads()} threads, crop {typed.crop}\n")
    print("| network | encoder | M parameters | GFLOP | precision | training step | forward |")
    print("|---|---|---|---|---|---|---|")
    for name, backbone, stride in NETWORKS:
        if typed.only not in f"{name} {backbone}":
            continue
        build = partial(build_model, name, backbone, CLASSES, stride)
        net, gigaflop = build(), flop(build, (typed.crop, typed.crop)) / 1e9
        millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
        size = f"{millions:.1f} | {gigaflop:.1f}"
        for device in devices:
            trained, fixed = device.place(net).train(), freeze(deepcopy(net), device)
            images = device.move(torch.randn(typed.batch, 3, typed.crop, typed.crop))
            works = partial(step, device, trained, images), partial(forward, device, fixed, images)
            times = [[seconds(work) for _ in range(4)] for work in works]
            speed = [f"{typed.batch / statistics.median(own[1:]):.2f}" for own in times]
            cells = [name, backbone, size, device.precision, *speed]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
