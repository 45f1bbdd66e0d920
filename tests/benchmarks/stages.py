"""Time every stage against its plain form, in turn, and measure what memory both take.

python tests/benchmarks/stages.py [--backbone resnet50] [--crop 321] [--threads 2] [--json FILE]

plain: plain.py, fp32. ours: the code that train.py runs, in the best precision here. Ratios are
medians of pairs A B, A B, ... in one process; memory is the peak of a child process that does
nothing else, less what it has after importing. Images: labeled ones (supervised), unlabeled ones
(retrain), whole ones of 480 x 360 (the rest). The floor is the time that the network's
convolutions would take at the best rate that a large one reaches here in our precision.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.timing import seconds
from tests.benchmarks.works import Bench, bench_parser
from utils.device import Device

FORMS = ("plain", "ours")
STAGES = {
    "supervised": Bench.supervised,
    "retrain, image": Bench.retrain,
    "retrain, bank": partial(Bench.retrain, rule="bank"),
    "pseudo-label": Bench.pseudo_label,
    "select": Bench.select,
    "evaluate": Bench.evaluate,
}
STEPS = ("supervised", "retrain, image", "retrain, bank")


def best_rate(device: Device, batch: int) -> float:
    """Return FLOP a second of the fastest of a few large convolutions, in our precision."""
    rates = []
    for channels, side in ((256, 80), (512, 41), (1024, 41)):
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        conv = device.place(conv).to(device.dtype)
        maps = device.move(torch.randn(2 * batch, channels, side, side)).to(device.dtype)
        with torch.inference_mode():
            time_taken = min(seconds(lambda c=conv, m=maps: c(m)) for _ in range(10))
        rates.append(2 * maps.numel() * channels * 9 / time_taken)
    return max(rates)


def resident(line: str) -> float:
    """MiB of this process: VmRSS, now; VmHWM, at most (ru_maxrss counts what the parent had)."""
    rows = dict(row.split(":") for row in Path("/proc/self/status").read_text().splitlines())
    return int(rows[line].split()[0]) / 2**10


def peak(bench: Bench, stage: str, form: str, before: float) -> float:
    """MiB that a call takes on top of ``before``, at the worst moment; momentum being there."""
    work = STAGES[stage](bench).forms[form]()
    for _ in range(2 if stage in STEPS else 1):
        work()
    if bench.device.torch_device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20 - before
    return resident("VmHWM") - before


def peak_alone(bench: Bench, stage: str, form: str) -> float:
    """Measure ``peak`` in a child process; on a CUDA device, which counts its own, here."""
    if bench.device.torch_device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return peak(bench, stage, form, torch.cuda.memory_allocated() / 2**20)
    words = [sys.executable, __file__, *sys.argv[1:], "--peak", stage, form]
    child = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(child.stdout.split()[-1])


def measure(bench: Bench, stage: str, rate: float, pairs: int) -> dict[str, float]:
    row, memory = STAGES[stage](bench), {form: peak_alone(bench, stage, form) for form in FORMS}
    works = {form: row.forms[form]() for form in FORMS}
    for form in FORMS:
        works[form]()  # the first call of a form allocates and chooses kernels
    times = [[seconds(works[form]) / row.images for form in FORMS] for _ in range(pairs)]
    plainly, ours = map(statistics.median, zip(*times, strict=True))
    return {
        "plain_images_per_second": 1 / plainly,
        "images_per_second": 1 / ours,
        "ratio": statistics.median(slow / fast for slow, fast in times),
        "plain_peak_mib": memory["plain"],
        "peak_mib": memory["ours"],
        "share_of_floor": row.flop / rate / ours,
    }


def main() -> None:
    before = resident("VmRSS")
    parser = bench_parser(__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--only", choices=STAGES, help="one stage")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    typed = parser.parse_args()
    torch.set_num_threads(typed.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(typed, Path(folder))
        if typed.peak:
            print(peak(bench, *typed.peak, before))
            return
        rate = best_rate(bench.device, bench.batch)
        print(f"{bench}, best convolution {rate / 1e9:.0f} GFLOP/s\n")
        print("| stage | plain images/s | images/s | ratio | plain MiB | MiB | share of floor |")
        print("|---|---|---|---|---|---|---|", flush=True)
        rows = {}
        for stage in [typed.only] if typed.only else STAGES:
            rows[stage] = row = measure(bench, stage, rate, typed.pairs)
            slow, fast, ratio, *memory, share = row.values()
            memory = " | ".join(f"{mib:.0f}" for mib in memory)
            print(f"| {stage} | {slow:.3f} | {fast:.3f} | {ratio:.2f} | {memory} | {share:.2f} |")
    if typed.json is not None:
        typed.json.write_text(json.dumps({"best_flop_per_second": rate, "stages": rows}, indent=2))


if __name__ == "__main__":
    main()
