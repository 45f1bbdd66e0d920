"""Print what reading and augmenting training samples costs, beside resize-then-crop.

python tests/benchmarks/loader.py [--only pascal camvid cityscapes] [--pairs 5]

The pictures are scenes of the demo set, as large on disk as photographs. A sample is what a
retraining step takes of one unlabeled image: that image, its labeled partner, another labeled
image; three pictures and three masks. The forms are timed in turn, A B A B; figures are medians,
ratios those of pairs. One thread a process, as workers have it.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from cProfile import Profile
from functools import partial
from itertools import islice
from pathlib import Path
from pstats import Stats
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset.cache import Memory
from dataset.catalog import KINDS
from dataset.demo.writing import Scenes, write_demo
from dataset.lists import Sample, SampleReader, Splits, read_sample, read_splits
from dataset.loader import RandomStreams, SampleKey, training_batches
from dataset.query import Querier, QueryRule, build_query_index
from dataset.training import RetrainSamples
from dataset.transforms import CropParams, random_view
from tests.benchmarks.timing import seconds, table
from utils.config.schema import AugmentSection, DatasetSection

BATCH, CHANCE = 4, RandomStreams(0, "4_retrain")


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
    view: CropParams, picture: Image.Image, resample: Image.Resampling, padding: int
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
        "image": lambda view, image, _="": whole_then_crop(view, image, Image.BILINEAR, 0),
        "mask": lambda view, mask: whole_then_crop(view, mask, Image.NEAREST, 255),
    },
    "window": {"image": CropParams.image, "mask": CropParams.mask},
}


def draw(root: Path, case: Case) -> Splits:
    """Draw a batch of labeled images, and one for validation: its masks stand for pseudo labels."""
    scenes = Scenes(BATCH + 1, labeled=BATCH, val=BATCH, test=1, size=case.size)
    write_demo(root, KINDS["demo"].palette(), scenes)

    def in_format(sample: Sample) -> Sample:
        image = sample.image.with_suffix(case.suffix)
        if image != sample.image:
            Image.open(sample.image).save(image)
        return sample._replace(image=image)

    splits = read_splits(DatasetSection(kind="demo", root=str(root)))
    return Splits(*(list(map(in_format, samples)) for samples in splits[:3]))


def build_set(splits: Splits, case: Case, read: SampleReader) -> RetrainSamples:
    rule = QueryRule(len(KINDS["demo"].classes), 0.03, frozenset())
    index = build_query_index(splits.labeled, rule)
    querier = Querier(splits.labeled, index, rule, case.augment, read)
    images = splits.val, splits.labeled
    return RetrainSamples(*images, case.augment, CHANCE, querier=querier, read=read)


def resample_milliseconds(splits: Splits, case: Case, pairs: int) -> dict[str, list[float]]:
    """Time both forms on the same views of decoded pictures: a picture and its mask."""
    pictures = [read_sample(sample) for sample in splits.labeled + splits.val] * case.batches
    rng, result = np.random.default_rng(0), defaultdict(list)

    def cut_all(views: list[CropParams]) -> None:
        for view, (image, mask) in zip(views, pictures, strict=True):
            view.image(image), view.mask(mask)

    for _ in range(pairs):
        views = [random_view(case.size, case.augment, rng) for _ in pictures]
        for form, cut in FORMS.items():
            with patch.multiple(CropParams, **cut):
                result[form].append(1e3 * seconds(partial(cut_all, views)) / len(views))
    return result


def samples_a_second(splits: Splits, case: Case, pairs: int, workers: int) -> dict[str, list]:
    """Time batches from the middle of a long stream: workers are warm before and busy after."""
    memory, rates = Memory(splits.labeled + splits.val, threads=2), defaultdict(list)
    forms = {form: (cut, read_sample) for form, cut in FORMS.items()}
    forms["window, cache: ram"] = FORMS["window"], memory
    for form, (cut, read) in [*forms.items()] * pairs:
        with patch.multiple(CropParams, **cut):  # forked workers inherit it
            dataset = build_set(splits, case, read)
            stream = training_batches(dataset, BATCH, range(10**6), CHANCE, workers)
            list(islice(stream, max(1, 2 * workers)))
            taken = seconds(lambda stream=stream: list(islice(stream, case.batches)))
        rates[form].append(BATCH * case.batches / taken)
    return rates


PARTS = {  # functions, by file, and what goes into them; collate calls itself, once a tensor
    ("dataset/training.py", "__getitem__"): "query, chance",  # and all of what follows but collate
    ("dataset/lists.py", "read_sample"): "decode",
    ("dataset/transforms.py", "image"): "resample",
    ("dataset/transforms.py", "mask"): "resample",
    ("dataset/transforms.py", "recolour"): "colour jitter",  # and blur
    ("PIL/Image.py", "filter"): "blur",
    ("dataset/reading.py", "to_input"): "to tensor",
    ("dataset/reading.py", "to_label"): "to tensor",
    ("_utils/collate.py", "default_collate"): "collate",
}


def shares(splits: Splits, case: Case) -> dict[str, float]:
    """Milliseconds a sample by what they go into, in one process."""
    dataset, profile = build_set(splits, case, read_sample), Profile()
    for epoch in range(case.batches + 1):
        with profile if epoch else nullcontext():  # the first batch warms up
            default_collate([dataset[SampleKey(epoch, index)] for index in range(BATCH)])
    spent = dict.fromkeys(sorted(PARTS.values()), 0.0)
    for (file, _, name), (_, _, _, cumulative, _) in Stats(profile).stats.items():
        for (end, function), title in PARTS.items():
            if name == function and file.endswith(end):
                spent[title] += 1e3 * cumulative / BATCH / case.batches
    spent["colour jitter"] -= spent["blur"]
    spent["query, chance"] -= sum(spent[p] for p in spent.keys() - {"collate", "query, chance"})
    return spent


def against(times: Mapping[str, list[float]], invert: bool) -> dict[str, str]:
    """Medians, and the median of the pairs' ratios of the first two columns."""
    slow, fast = list(times.values())[:2]
    ratios = [a / b if invert else b / a for a, b in zip(slow, fast, strict=True)]
    cells = {form: f"{statistics.median(each):.2f}" for form, each in times.items()}
    return {**cells, "window is faster": f"{statistics.median(ratios):.2f} x"}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--pairs", type=int, default=5, help="of measurements")
    typed = parser.parse_args()
    torch.multiprocessing.set_start_method("fork")
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores\n")
    resample, rates, parts = {}, {}, {}
    for name in typed.only:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            splits = draw(Path(folder), case)
            resample[name] = against(resample_milliseconds(splits, case, typed.pairs), invert=True)
            for workers in (0, 2):
                found = samples_a_second(splits, case, typed.pairs, workers)
                rates[f"{name}, {workers} workers"] = against(found, invert=False)
            spent = shares(splits, case)
            total = sum(spent.values())
            parts[name] = {part: f"{ms:.1f} ({ms / total:.0%})" for part, ms in spent.items()}
    table("resample, ms a picture and mask", resample)
    table("samples/s", rates)
    table("ms a sample (share)", parts)


if __name__ == "__main__":
    main()
