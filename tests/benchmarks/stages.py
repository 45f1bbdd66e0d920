"""Time every stage against its plain form, in turn, and measure what memory both take.

python tests/benchmarks/stages.py [--backbone resnet50] [--crop 321] [--threads 2]
    [--batch 16 --images 256 --workers 12]

plain: plain.py, fp32. ours: the code that train.py runs, in the best precision here. Ratios are
medians of pairs A B, A B, ... in one process; memory is the peak of a child process that does
nothing else, less what it has after importing. Images: labeled ones (supervised), unlabeled ones
(retrain), whole ones (the rest). Steps are given a batch that is in memory; whole
images are read each time, in both forms by so many workers, whose start counts: give them many
images. The floor is the time that the network's convolutions would take at the best rate that a
large one reaches here in our precision.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train
from dataset.catalog import dataset_info
from dataset.demo.writing import Scenes, write_demo
from dataset.lists import read_splits
from dataset.loader import RandomStreams, training_batches
from dataset.query import Querier, QueryRule, build_query_index
from dataset.training import LabeledPairs, RetrainSamples
from eval import evaluate
from model import Segmenter, fitting, network_of
from model.cisc.students import ClassPixels, Labeler
from model.losses import cross_entropy
from model.ops.frozen import freeze
from tests.benchmarks import plain
from tests.benchmarks.timing import flop, seconds
from utils.checkpoint import save
from utils.config.reading import read_config
from utils.device import Device
from utils.optimization import Optimization
from utils.run.log import Log
from utils.run.stages import Stage, Stopwatch, checkpoint_of

SCALES, IMAGES = [0.5, 0.75, 1.0, 1.5, 2.0], 4
CHANCE = RandomStreams(0, "benchmark")


class Row(NamedTuple):
    """What is timed: how to build both forms, images a call, arithmetic of an image."""

    forms: dict[str, Callable[[], Callable[[], object]]]
    images: int
    flop: float


def bench_parser(description: str) -> argparse.ArgumentParser:
    """Make a command line with what ``Bench`` asks for, and threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--crop", type=int, default=321)
    parser.add_argument("--batch", type=int, default=2, help="samples; a pair has two images")
    parser.add_argument("--images", type=int, help="whole ones a call; a batch, 4 at least")
    parser.add_argument("--size", type=int, nargs=2, default=(360, 480), help="height and width")
    parser.add_argument("--workers", type=int, default=0, help="read whole images, in both forms")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


class Bench:
    """Drawn images and a configuration; a method a stage builds what is timed there."""

    def __init__(self, typed: argparse.Namespace, folder: Path) -> None:
        self.folder, root = folder, folder / "data"
        self.batch, self.images = typed.batch, typed.images or max(IMAGES, typed.batch)
        self.size = tuple(typed.size)
        self.crop = (typed.crop, typed.crop)
        words = [
            f"dataset.root={root}",
            f"model={{backbone: {typed.backbone}, output_stride: 8, channels: null}}",
            f"augment={{base_size: 480, crop_size: {typed.crop}}}",
            f"pseudo_label={{scales: {SCALES}, neighbours: false}}",
            f"inference.batch_size={max(IMAGES, typed.batch)}",
            "query.exclude=[]",
            f"workers={typed.workers}",
        ]
        self.config = read_config("demo.yaml", words)
        kind = dataset_info(self.config.dataset)
        count = max(self.images, typed.batch)
        write_demo(root, kind.palette(), Scenes(2 * count, count, count, 1, size=self.size))
        self.device = Device(typed.device, typed.precision)
        self.splits, self.classes = read_splits(self.config.dataset), len(kind.classes)
        rule = QueryRule.of(self.config.query, kind)
        self.index = build_query_index(self.splits.labeled, rule)
        self.querier = Querier(self.splits.labeled, self.index, rule, self.config.augment)
        self.teacher = folder / "teacher"
        torch.manual_seed(0)
        save(checkpoint_of(self.teacher), {"model": self.network().state_dict()})

    def __str__(self) -> str:
        sizes = f"crop {self.config.augment.crop_size}, batch {self.batch}"
        processes = f"{torch.get_num_threads()} threads, {self.config.workers} workers"
        return f"{self.config.model.backbone}, {sizes}, {self.device}, {processes}"

    def network(self) -> nn.Module:
        return network_of(self.config.model, self.classes, pretrained=None)

    def plain(self) -> nn.Module:
        return plain.plain_network(self.network()).to(self.device.torch_device)

    def ours(self) -> nn.Module:
        return self.device.place(self.network())

    def stage(self, name: str) -> Stage:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        watch = Stopwatch(folder / "unfinished" / "seconds")
        return Stage(name, folder, self.config, self.device, Log(folder), watch)

    def on_device(self, batch: tuple) -> tuple:
        """Move a record as it is, not channels-last."""
        return type(batch)._make(
            part.to(self.device.torch_device) if isinstance(part, Tensor) else self.on_device(part)
            for part in batch
        )

    def step(self, net: nn.Module, objective: fitting.Objective, batch: tuple) -> Callable:
        """Build the step that ``fit`` repeats."""
        optimization = Optimization(net, self.config.optimizer, 10_000, self.device.scaler())
        step = fitting.TrainingStep(net, objective, optimization, self.device)
        return lambda: step(self.device.move(batch), seed=0)

    def retrain_step(self, batch: tuple) -> Callable:
        section = {"weight": "cisc_map", "mix": "none", "threshold": 0.0}
        settings = self.config.retrain.model_copy(update=section)
        labeler = Labeler(settings, freeze(self.network(), self.device))
        loss = partial(train.retrain_loss, labeled_loss=cross_entropy)
        seen = ClassPixels(self.classes).to(self.device.torch_device)
        return self.step(self.ours(), train.RetrainObjective(loss, seen, labeler, None), batch)

    def plain_step(self, net: nn.Module, work: Callable, batch: tuple, *more: object) -> Callable:
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
        return partial(work, net, *more, optimizer, self.on_device(batch))

    def supervised(self) -> Row:
        pairs = LabeledPairs(self.splits.labeled, self.config.augment, CHANCE, 1, self.querier)
        (batch, *_) = training_batches(pairs, self.batch, range(1), CHANCE, 0)
        loss = partial(train.supervised_loss, labeled_loss=cross_entropy, consistency=1.0)
        seen = ClassPixels(self.classes).to(self.device.torch_device)
        objective = train.SupervisedObjective(loss, seen)
        forms = {
            "plain": lambda: self.plain_step(self.plain(), plain.supervised_step, batch),
            "ours": lambda: self.step(self.ours(), objective, batch),
        }
        return Row(forms, 2 * self.batch, 3 * flop(self.network, self.crop))

    def retrain(self) -> Row:
        # The true masks of val stand for pseudo labels.
        images, augment = (self.splits.val, self.splits.labeled), self.config.augment
        samples = RetrainSamples(*images, augment, CHANCE, querier=self.querier)
        (batch, *_) = training_batches(samples, self.batch, range(1), CHANCE, 0)

        def naive() -> Callable:
            return self.plain_step(self.plain(), plain.retrain_step, batch, self.plain().eval())

        forms = {"plain": naive, "ours": lambda: self.retrain_step(batch)}
        return Row(forms, self.batch, (2 * 3 + 2) * flop(self.network, self.crop))

    def pseudo_label(self) -> Row:
        samples, device = self.splits.unlabeled[: self.images], self.device.torch_device

        def ours() -> None:  # a new stage each time: one that is there goes on where it stopped
            given = train.Labeling(self.teacher, None), self.splits, samples
            train.write_pseudo_labels(self.stage("labels"), *given)

        def naive() -> Callable:
            folder, net = self.folder / "plain", self.plain().eval()
            folder.mkdir(exist_ok=True)
            given = samples, SCALES, device, folder, self.config.workers
            return partial(plain.pseudo_label, net, *given)

        sizes = [[round(side * scale) for side in self.size] for scale in SCALES]
        passes = 2 * sum(flop(self.network, size) for size in sizes)
        return Row({"plain": naive, "ours": lambda: ours}, len(samples), passes)

    def select(self) -> Row:
        labeled, unlabeled = self.splits.labeled[: self.images], self.splits.val[: self.images]
        splits = self.splits._replace(labeled=labeled, unlabeled=unlabeled)
        given = self.stage("select"), self.teacher, splits, unlabeled, self.index

        def naive() -> Callable:
            net = self.plain().eval()
            device, workers = self.device.torch_device, self.config.workers
            return partial(plain.select, net, labeled, unlabeled, device, workers)

        forms = {"plain": naive, "ours": lambda: partial(train.select, *given)}
        return Row(forms, len(labeled) + len(unlabeled), flop(self.network, self.size))

    def evaluate(self) -> Row:
        val = self.splits.val

        def naive() -> Callable:
            net, device = self.plain().eval(), self.device.torch_device
            return partial(plain.evaluate, net, val, self.classes, device, self.config.workers)

        def ours() -> Callable:
            net = self.network()
            return lambda: evaluate(Segmenter(net, self.config))

        forms = {"plain": naive, "ours": ours}
        return Row(forms, len(val), flop(self.network, self.size))


FORMS = ("plain", "ours")
STAGES = {
    "supervised": Bench.supervised,
    "retrain": Bench.retrain,
    "pseudo-label": Bench.pseudo_label,
    "select": Bench.select,
    "evaluate": Bench.evaluate,
}
STEPS = ("supervised", "retrain")


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


def measure(bench: Bench, stage: str, rate: float, pairs: int) -> list[float]:
    """Return a row of the table: images a second (two), their ratio, MiB (two), share of floor."""
    row, memory = STAGES[stage](bench), {form: peak_alone(bench, stage, form) for form in FORMS}
    works = {form: row.forms[form]() for form in FORMS}
    for form in FORMS:
        works[form]()  # the first call of a form allocates and chooses kernels
    times = [[seconds(works[form]) / row.images for form in FORMS] for _ in range(pairs)]
    plainly, ours = map(statistics.median, zip(*times, strict=True))
    ratio = statistics.median(slow / fast for slow, fast in times)
    return [1 / plainly, 1 / ours, ratio, *memory.values(), row.flop / rate / ours]


def main() -> None:
    before = resident("VmRSS")
    parser = bench_parser(__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--only", choices=STAGES, help="one stage")
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
        for stage in [typed.only] if typed.only else STAGES:
            slow, fast, ratio, *memory, share = measure(bench, stage, rate, typed.pairs)
            memory = " | ".join(f"{mib:.0f}" for mib in memory)
            print(f"| {stage} | {slow:.3f} | {fast:.3f} | {ratio:.2f} | {memory} | {share:.2f} |")


if __name__ == "__main__":
    main()
