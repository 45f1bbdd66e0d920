"""What the benchmarks share: a clock, a count of arithmetic, tables."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def seconds(work: Callable[[], object]) -> float:
    """Time a call; on a CUDA device until its kernels are done."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def flop(build: Callable[[], nn.Module], size: Sequence[int]) -> float:
    """Count the multiplications and additions of a network's pass of one image."""
    with torch.device("meta"):
        net, image = build().eval(), torch.empty(1, 3, *size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(image)
    return counter.get_total_flops()


def table(title: str, rows: Mapping[str, Mapping[str, str]]) -> None:
    """Print rows of cells under the columns that they name, all the same ones."""
    columns = list(next(iter(rows.values())))
    print(f"| {' | '.join([title, *columns])} |", "| --- " * (1 + len(columns)) + "|", sep="\n")
    for name, row in rows.items():
        print(f"| {' | '.join([name, *row.values()])} |")
    print(flush=True)
