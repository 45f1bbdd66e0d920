"""Tell where the time of a training step goes, and what two choices in it are worth.

python tests/benchmarks/step.py [--backbone resnet50] [--crop 321] [--batch 2] [--threads 2]

Shares: a retraining step of the code that train.py runs, by torch's profiler, each operation's
own time. Dilated: the pyramid's three convolutions at output stride 8, torch's and
model/ops/dilated.py's in turn, the fastest of five. Compiled: the step with ``model.compile`` after
the first one, which compiles; --no-compile leaves it out.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.ops.dilated import DilatedConv2d
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


def print_dilated(bench: Bench, crop: int) -> None:
    side = (crop + 7) // 8
    maps = torch.randn(2 * bench.batch, CHANNELS, side, side)
    maps = bench.device.move(maps).to(bench.device.dtype).requires_grad_()
    print(f"\n| dilated, {tuple(maps.shape)} | torch ms | windows ms | windows are faster |")
    print("|---|---|---|---|")
    works = {
        "forward": torch.no_grad()(lambda conv: conv(maps)),
        "both ways": lambda conv: conv(maps).sum().backward(),
    }
    for rate in RATES:
        windows = bench.device.place(DilatedConv2d(CHANNELS, FEATURES, rate))
        kernel = nn.Conv2d(CHANNELS, FEATURES, 3, padding=rate, dilation=rate, bias=False)
        pair = [conv.to(bench.device.dtype) for conv in (bench.device.place(kernel), windows)]
        for title, work in works.items():
            times = [[seconds(partial(work, conv)) for conv in pair] for _ in range(5)]
            slow, fast = (1e3 * min(own) for own in zip(*times, strict=True))
            print(f"| rate {rate}, {title} | {slow:.1f} | {fast:.1f} | {slow / fast:.1f} x |")


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
        print_dilated(bench, typed.crop)
        if typed.compile:
            print_compiled(bench, step)


if __name__ == "__main__":
    main()
