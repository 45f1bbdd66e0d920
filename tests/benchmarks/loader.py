"""Print what reading and augmenting training samples costs, beside resize-then-crop.

python tests/benchmarks/loader.py [--json FILE] [--only pascal camvid cityscapes] [--pairs 5]

The pictures are drawn here, as large on disk as photographs. A sample is what a retraining step
takes of one unlabeled image: that image, its labeled partner, another labeled image; three pictures
and three masks. The forms are timed in turn, A B A B; figures are medians, ratios those of pairs.
One thread a process, as workers have it.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import default_collate
from torchvision.io import ImageReadMode, decode_image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset import training
from dataset.cache import Memory
from dataset.lists import Sample, SampleReader, read_sample
from dataset.loader import Chance, SampleKey, training_batches
from dataset.query import Querier, QueryRule, build_query_index
from dataset.reading import read_image
from dataset.training import RetrainSamples
from dataset.transforms import View, random_view
from utils.config.schema import AugmentSection
from utils.files import write_json

CLASSES, PICTURES, BATCH = 19, 12, 4
CHANCE = Chance(0, "4_retrain")


class Case(NamedTuple):
    size: tuple[int, int]  # (height, width)
    suffix: str
    augment: AugmentSection
    batches: int  # timed at once


CASES = {
    "pascal": Case((375, 500), ".jpg", AugmentSection(base_size=400, crop_size=321), 12),
    "camvid": Case((360, 480), ".jpg", AugmentSection(base_size=480, crop_size=321), 12),
    "cityscapes": Case((1024, 2048), ".png", AugmentSection(base_size=2048, crop_size=721), 3),
}


def whole_then_crop(
    view: View, picture: Image.Image, resample: Image.Resampling, padding: int
) -> Image.Image:
    """Cut as usually written: scale all of the picture, then keep the window."""
    height, width = (min(view.crop, side) for side in view.scaled)
    whole = picture.resize(view.scaled[::-1], resample)
    window = whole.crop((view.left, view.top, view.left + width, view.top + height))
    if view.flip:
        window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return ImageOps.expand(window, (0, 0, view.crop - width, view.crop - height), fill=padding)


FORMS = {
    "resize, then crop": {
        "image": lambda view, image: whole_then_crop(view, image, Image.Resampling.BILINEAR, 0),
        "mask": lambda view, mask: whole_then_crop(view, mask, Image.Resampling.NEAREST, 255),
    },
    "window": {"image": View.image, "mask": View.mask},
}


def draw(size: tuple[int, int], rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Smooth shapes, finer ones on top, and the grain of a camera; a mask with wavy borders."""

    def waves(cells: int, channels: int) -> np.ndarray:
        coarse = rng.normal(size=(channels, max(2, cells * size[0] // size[1]), cells))
        planes = [Image.fromarray(plane.astype(np.float32)) for plane in coarse]
        return np.stack([np.asarray(plane.resize(size[::-1])) for plane in planes], axis=-1)

    pixels = 118 + rng.normal(scale=4, size=(*size, 1))
    for cells, height in ((4, 90), (16, 45), (64, 22), (200, 10)):
        pixels = pixels + height * (waves(cells, 1) + 0.4 * waves(cells, 3))
    mask = waves(12, CLASSES).argmax(axis=-1)
    return tuple(Image.fromarray(x.clip(0, 255).astype(np.uint8)) for x in (pixels, mask))


def write_samples(folder: Path, case: Case) -> list[Sample]:
    samples = []
    for number in range(PICTURES):
        image, mask = folder / f"{number}{case.suffix}", folder / f"{number}_ids.png"
        pictures = draw(case.size, np.random.default_rng(number))
        for path, picture in zip((image, mask), pictures, strict=True):
            picture.save(path, **({"quality": 92} if path.suffix == ".jpg" else {}))
        samples.append(Sample(image.name, image, mask))
    return samples


def build_set(samples: list[Sample], case: Case, read: SampleReader) -> RetrainSamples:
    rule = QueryRule(CLASSES, 0.03, frozenset())
    labeled = samples[: PICTURES // 2]
    querier = Querier(labeled, build_query_index(labeled, rule), rule, case.augment, read)
    unlabeled = samples[PICTURES // 2 :]
    query = querier.draw
    return RetrainSamples(unlabeled, labeled, query, case.augment, CHANCE, read=read)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def resample_milliseconds(samples: list[Sample], case: Case, pairs: int) -> dict[str, list[float]]:
    """Time both forms on the same views of decoded pictures: a picture and its mask."""
    pictures = [read_sample(sample) for sample in samples]
    rng, result = np.random.default_rng(0), defaultdict(list)
    for _ in range(pairs):
        views = [random_view(case.size, case.augment, rng) for _ in pictures * case.batches]

        def cut_all(views: list[View] = views) -> None:
            for view, (image, mask) in zip(views, pictures * case.batches, strict=True):
                view.image(image), view.mask(mask)

        for form, cut in FORMS.items():
            with patch.multiple(View, **cut):
                result[form].append(1e3 * seconds(cut_all) / len(views))
    return result


def samples_a_second(dataset: RetrainSamples, batches: int, workers: int) -> float:
    """Time batches from the middle of a long stream: workers are warm before and busy after."""
    stream = training_batches(dataset, BATCH, range(10**6), CHANCE, workers)
    warm = max(1, 2 * workers)
    list(islice(stream, warm))
    return BATCH * batches / seconds(lambda: list(islice(stream, batches)))


class Clock:
    """Adds up seconds by title; what a timed function calls of others counts as theirs alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = 0.0

    @contextmanager
    def measure(self, title: str) -> Iterator[None]:
        outer, self._inner = self._inner, 0.0
        start = time.perf_counter()
        yield
        passed = time.perf_counter() - start
        self.seconds[title] += passed - self._inner
        self._inner = outer + passed

    def timed(self, title: str, function: Callable) -> Callable:
        def call(*args: object, **keys: object) -> object:
            with self.measure(title):
                return function(*args, **keys)

        return call


def shares(samples: list[Sample], case: Case) -> dict[str, float]:
    """Milliseconds a sample by what they go into, in one process."""
    clock = Clock()
    dataset = build_set(samples, case, clock.timed("decode", read_sample))
    watched = (
        (View, "image", "resample"),
        (View, "mask", "resample"),
        (training, "recolour", "colour jitter"),
        (Image.Image, "filter", "blur"),
        (training, "to_input", "to tensor"),
        (training, "to_label", "to tensor"),
    )
    with ExitStack() as stack:
        for place, name, title in watched:
            timed = clock.timed(title, getattr(place, name))
            stack.enter_context(patch.object(place, name, timed))
        for epoch in range(case.batches + 1):
            if epoch == 1:
                clock.seconds.clear()  # the first batch warms up
            with clock.measure("query, chance"):
                batch = [dataset[SampleKey(epoch, index)] for index in range(BATCH)]
            with clock.measure("collate"):
                default_collate(batch)
    return {title: 1e3 * total / BATCH / case.batches for title, total in clock.seconds.items()}


def decoders(sample: Sample, repeats: int) -> dict[str, float]:
    """Milliseconds from a file to a picture in memory; draft, to half the size, is not exact."""
    path = sample.image

    def torchvision() -> Image.Image:
        pixels = decode_image(path, ImageReadMode.RGB)
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())

    def draft() -> Image.Image:
        picture = Image.open(path)
        picture.draft("RGB", (picture.width // 2, picture.height // 2))
        return picture.convert("RGB")

    if not np.array_equal(read_image(path), torchvision()):
        print(f"torchvision decodes {path.suffix} to other pixels than Pillow here")
    ways = {"Pillow": lambda: read_image(path), "torchvision": torchvision}
    if path.suffix == ".jpg":
        ways["Pillow, draft"] = draft
    times = [[1e3 * seconds(way) for way in ways.values()] for _ in range(repeats)]
    return dict(zip(ways, map(statistics.median, zip(*times, strict=True)), strict=True))


def measure(case: Case, samples: list[Sample], pairs: int) -> dict[str, Any]:
    """Take all figures of a case."""
    rates: dict[str, dict[str, list[float]]] = {}
    memory = Memory(samples, threads=2)
    for workers in (0, 2):
        rates[str(workers)] = defaultdict(list)
        for _ in range(pairs):
            for form, cut in FORMS.items():
                with patch.multiple(View, **cut):  # forked workers inherit it
                    dataset = build_set(samples, case, read_sample)
                    rate = samples_a_second(dataset, case.batches, workers)
                rates[str(workers)][form].append(rate)
            rate = samples_a_second(build_set(samples, case, memory), case.batches, workers)
            rates[str(workers)]["window, cache: ram"].append(rate)
    return {
        "kilobytes": statistics.mean(s.image.stat().st_size / 1000 for s in samples),
        "resample_ms": resample_milliseconds(samples, case, pairs),
        "samples_per_second": rates,
        "shares_ms": shares(samples, case),
        "decode_ms": decoders(samples[0], 5 * pairs),
    }


def table(title: str, rows: Mapping[str, Mapping[str, str]]) -> None:
    columns = next(iter(rows.values()))
    lines = [[title, *columns], ["---"] * (1 + len(columns))]
    for line in [*lines, *([name, *row.values()] for name, row in rows.items())]:
        print(f"| {' | '.join(line)} |")
    print(flush=True)


def against(times: Mapping[str, list[float]], invert: bool) -> dict[str, str]:
    """Medians, and the median of the pairs' ratios of the first two columns."""
    slow, fast = list(times.values())[:2]
    ratios = [a / b if invert else b / a for a, b in zip(slow, fast, strict=True)]
    cells = {form: f"{statistics.median(each):.2f}" for form, each in times.items()}
    return {**cells, "window is faster": f"{statistics.median(ratios):.2f} x"}


def show(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the tables."""
    table(
        "resample, ms a picture and mask",
        {name: against(r["resample_ms"], invert=True) for name, r in results.items()},
    )
    table(
        "samples/s",
        {
            f"{name}, {workers} workers": against(rates, invert=False)
            for name, r in results.items()
            for workers, rates in r["samples_per_second"].items()
        },
    )
    table(
        "ms a sample (share)",
        {
            name: {
                part: f"{ms:.1f} ({ms / sum(r['shares_ms'].values()):.0%})"
                for part, ms in sorted(r["shares_ms"].items())
            }
            for name, r in results.items()
        },
    )
    table(
        "decode, ms a picture",
        {
            f"{name}, {r['kilobytes']:.0f} kB": {
                way: f"{r['decode_ms'][way]:.2f}" if way in r["decode_ms"] else "-"
                for way in ("Pillow", "torchvision", "Pillow, draft")
            }
            for name, r in results.items()
        },
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--pairs", type=int, default=5, help="of measurements")
    arguments = parser.parse_args()
    torch.multiprocessing.set_start_method("fork")
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores\n")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            place = Path(folder) / name
            place.mkdir()
            samples = write_samples(place, CASES[name])
            results[name] = measure(CASES[name], samples, arguments.pairs)
    show(results)
    if arguments.json is not None:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
