"""Tell where the time of a training step goes, and what two choices in it are worth.

python tests/benchmarks/step.py [--backbone resnet50] [--crop 321] [--batch 2] [--threads 2]

Shares: a retraining step of the code that train.py runs, by torch's profiler, each operation's
own time. Convolutions: the pyramid's three at output stride 8, and depthwise ones as in the last
blocks of EfficientNet-Lite0, torch's and model/ops/dilated.py's in turn, the fastest of five.
Compiled: the step with ``model.compile`` after the first one; --no-compile leaves it out.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.ops.dilated import DilatedConv2d, DilatedDepthwiseConv2d
from tests.benchmarks.stages import Bench, bench_parser
from tests.benchmarks.timing import seconds

KINDS = {  # of operations, by what their names hold; the first that fits
    "convolutions": ("conv",),
    "batch norm": ("batch_norm",),
    "ReLU": ("clamp", "threshold", "relu"),
    "additions": ("aten::add",),
    "copies and casts": ("copy", "cat", "contiguous"),
    "update of weights": ("sgd",),
    "the rest": ("",),
}
CHANNELS, FEATURES, RATES = 2048, 256, (12, 24, 36)
DEPTHWISE = ((672, 5, 2, 8), (1152, 5, 2, 8), (1152, 3, 2, 8))


def shares(step: Callable[[], object]) -> dict[str, float]:
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    step()
    with profile(activities=activities) as profiled:
        step()
        if cuda:
            torch.cuda.synchronize()
    times = dict.fromkeys(KINDS, 0.0)
    for row in profiled.key_averages():
        if cuda and not row.key.startswith("aten::"):
            continue  # a kernel: its time is its operation's too
        kind = next(kind for kind, parts in KINDS.items() if any(p in row.key for p in parts))
        times[kind] += row.self_device_time_total if cuda else row.self_cpu_time_total
    return {kind: time / sum(times.values()) for kind, time in times.items()}


def convolutions(crop: int) -> Iterator[tuple[str, int, int, nn.Module, nn.Module]]:
    """Yield what is timed: title, channels and side of the maps, torch's convolution, ours."""
    for rate in RATES:
        plain = nn.Conv2d(CHANNELS, FEATURES, 3, padding=rate, dilation=rate, bias=False)
        own = DilatedConv2d(CHANNELS, FEATURES, rate)
        yield f"dilated, rate {rate}", CHANNELS, (crop + 7) // 8, plain, own
    for channels, size, rate, side in DEPTHWISE:
        shape = {"padding": rate * (size // 2), "dilation": rate, "groups": channels}
        plain = nn.Conv2d(channels, channels, size, bias=False, **shape)
        own = DilatedDepthwiseConv2d.of(deepcopy(plain))
        yield f"depthwise {size} x {size}, rate {rate}", channels, side, plain, own


def print_convolutions(bench: Bench, crop: int) -> None:
    print("\n| convolution | maps | torch ms | ours ms | ours is faster |")
    print("|---|---|---|---|---|")
    for title, channels, side, *pair in convolutions(crop):
        maps = bench.device.move(torch.randn(2 * bench.batch, channels, side, side))
        maps = maps.to(bench.device.dtype).requires_grad_()
        pair = [bench.device.place(conv).to(bench.device.dtype) for conv in pair]
        forward = torch.no_grad()(lambda conv, maps=maps: conv(maps))
        both = lambda conv, maps=maps: conv(maps).sum().backward()  # noqa: E731
        for way, work in {"forward": forward, "both ways": both}.items():
            times = [[seconds(partial(work, conv)) for conv in pair] for _ in range(5)]
            slow, fast = (1e3 * min(each) for each in zip(*times, strict=True))
            cells = f"{channels} x {side} x {side} | {slow:.1f} | {fast:.1f} | {slow / fast:.1f} x"
            print(f"| {title}, {way} | {cells} |")


def print_compiled(bench: Bench, step: Callable[[], object]) -> None:
    eager = bench.ours
    plainly = min(seconds(step) for _ in range(3))

    def compiled() -> nn.Module:
        net = eager()
        net.compile(dynamic=False)
        return net

    bench.ours = compiled
    work = bench.retrain().forms["ours"]()
    first = seconds(work)
    again = min(seconds(work) for _ in range(3))
    print(f"\ncompiled: {first:.0f} s for the first step, then {plainly / again:.2f} x as fast")


def main() -> None:
    parser = bench_parser(__doc__.split("\n")[0])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    typed = parser.parse_args()
    torch.set_num_threads(typed.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(typed, Path(folder))
        print(f"{bench}\n\n| of a retraining step | share |\n|---|---|")
        step = bench.retrain().forms["ours"]()
        for kind, share in shares(step).items():
            print(f"| {kind} | {share:.0%} |", flush=True)
        print_convolutions(bench, typed.crop)
        if typed.compile:
            print_compiled(bench, step)


if __name__ == "__main__":
    main()
