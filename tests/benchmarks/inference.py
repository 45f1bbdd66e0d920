"""Tell where labeling, selection and evaluation of whole images spend their time.

python tests/benchmarks/inference.py [--backbone resnet50] [--batch 16 --images 256 --workers 12]

Of each stage, reading and writing included: images a second, the share of that time in which the
device computes (on a CPU: in which torch does), the operations that take most of it, and the
functions in which this process spends its own. Profiling costs some of the speed.
"""

import sys
import tempfile
from collections.abc import Callable
from cProfile import Profile
from pathlib import Path
from pstats import Stats

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.stages import STAGES, Bench, bench_parser
from tests.benchmarks.timing import seconds

SHOWN = 8


def operations(work: Callable[[], object]) -> tuple[float, dict[str, float]]:
    """Return the seconds that a call takes, and those of each kernel (on a CPU, operation)."""
    cuda = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        took = seconds(work)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    return took, {row.key: getattr(row, key) / 1e6 for row in profiled.key_averages()}


def main() -> None:
    typed = bench_parser(__doc__.split("\n")[0]).parse_args()
    torch.set_num_threads(typed.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(typed, Path(folder))
        print(bench, flush=True)
        for stage in ("pseudo-label", "select", "evaluate"):
            row = STAGES[stage](bench)
            work = row.forms["ours"]()
            work()  # the first call allocates and chooses kernels
            took, kernels = operations(work)
            busy = sum(kernels.values()) / took
            print(f"\n{stage}: {row.images / took:.2f} images/s, the device computes {busy:.0%}")
            for name in sorted(kernels, key=kernels.get, reverse=True)[:SHOWN]:
                print(f"  {kernels[name] / took:6.1%}  {name[:90]}")
            own = Profile()
            own.runcall(work)
            Stats(own).strip_dirs().sort_stats("tottime").print_stats(SHOWN)
            sys.stdout.flush()


if __name__ == "__main__":
    main()
