"""Print every network of the family: size, arithmetic, and speed here.

python tests/benchmarks/networks.py [--output-stride 16] [--device auto] [--precision auto]

GFLOP count the multiplications and additions of one forward pass of one image, two a
multiply-add, off shapes alone. Images a second: forward, batches of 4 at 321 x 321, the median
of five after one to warm up.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model import BACKBONES, NETWORKS, build_model
from utils.device import Device

CLASSES, BATCH, SIDE = 21, 4, 321


def gigaflop(net: nn.Module, side: int) -> float:
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        net(torch.empty(1, 3, side, side))
    return counter.get_total_flops() / 1e9


@torch.inference_mode()
def images_a_second(net: nn.Module, device: Device) -> float:
    images = device.move(torch.randn(BATCH, 3, SIDE, SIDE))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        with device.autocast():
            net(images).logits.sum().item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return BATCH / statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output-stride", type=int, default=16, choices=(8, 16))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    arguments = parser.parse_args()
    device, stride = Device(arguments.device, arguments.precision), arguments.output_stride
    print(f"{device}, {torch.get_num_threads()} threads, {CLASSES} classes\n")
    titles = "network | backbone | output stride | M parameters | GFLOP 321 | GFLOP 513 | images/s"
    print(f"| {titles} |", "|---|---|---|---|---|---|---|", sep="\n")
    for name in NETWORKS:
        for backbone in BACKBONES:
            with torch.device("meta"):
                shape = build_model(name, backbone, CLASSES, stride).eval()
            millions = sum(parameter.numel() for parameter in shape.parameters()) / 1e6
            net = device.place(build_model(name, backbone, CLASSES, stride)).eval()
            numbers = (millions, gigaflop(shape, SIDE), gigaflop(shape, 513))
            cells = " | ".join(f"{number:.1f}" for number in numbers)
            speed = images_a_second(net, device)
            print(f"| {name} | {backbone} | {stride} | {cells} | {speed:.2f} |", flush=True)


if __name__ == "__main__":
    main()
