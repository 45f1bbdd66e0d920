"""Training, evaluation and ``Segmenter`` on a CUDA device; without one, on a CPU that simulates it.

A simulated device takes the same paths of the project and refuses what mixes devices
(``simulated.py``); arithmetic, ``torch.compile`` and NCCL need the real one.
"""

import json
import shutil
import signal
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import believe_votes, same
from networks import FAMILIES, with_statistics
from simulated import simulated_cuda
from torch import nn

import eval as evaluation
import train
from dataset.catalog import KINDS
from dataset.loader import whole_images
from dataset.predictions import keep_predictions
from dataset.query import QueryRule, build_query_index
from model import Segmenter, build_model, fitting
from model.ops.frozen import freeze
from utils.config.reading import read_config
from utils.device import Device
from utils.errors import Stopped
from utils.run.log import Log
from utils.run.stages import Stage, Stopwatch

REAL = torch.cuda.is_available()
pytestmark = pytest.mark.slow
needs_cuda = pytest.mark.skipif(not REAL, reason="there is no CUDA device")


@pytest.fixture(autouse=True)
def cuda():
    """Let ``cuda`` be a device; give the simulated one's count of waits, None of a real one."""
    if REAL:
        yield None
    else:
        with simulated_cuda() as waits:
            yield waits


@pytest.fixture
def run(demo_root, tmp_path, tiny_settings):
    """Do the six stages of a tiny run; return its folder."""

    def do(name, *words):
        settings = [*tiny_settings(demo_root, tmp_path), "device=cuda", "precision=bf16", *words]
        train.train(read_config("demo.yaml", [*settings, f"name={name}"]))
        return tmp_path / name

    return do


def made(folder):
    """Return what the stages of a run made: weights by file and key, masks by file."""
    weights = {
        (file.parent.name, key): value
        for file in folder.glob("*/checkpoint.pth")
        for key, value in torch.load(file, map_location="cpu", weights_only=True)["model"].items()
    }
    return weights, {
        file.relative_to(folder): file.read_bytes() for file in folder.glob("*/masks/**/*.png")
    }


def assert_same(one, other):
    (weights, masks), (other_weights, other_masks) = made(one), made(other)
    assert len(masks) == 15  # ten unlabeled images, five of them once more
    assert masks == other_masks
    assert same(weights, other_weights)


def numbers():
    return torch.arange(6.0, device="cuda").view(2, 3)


@pytest.mark.parametrize(
    "mix",
    [
        lambda: numbers() + torch.ones(3),
        lambda: torch.ones(3).add_(numbers()[0]),
        lambda: torch.zeros(()).add_(numbers()[0, 0]),
        lambda: torch.cat([numbers(), torch.ones(2, 3)]),
        lambda: torch.stack([numbers().sum(), torch.tensor(1.0)]),
        lambda: torch.ones(4)[numbers()[0].long()],
        lambda: torch.where(numbers() > 1, numbers(), torch.ones(2, 3)),
        lambda: nn.Linear(3, 1)(numbers()),
        lambda: Device("cuda", "fp32").place(nn.Linear(3, 1))(torch.ones(2, 3)),
        lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
        lambda: numbers().numpy(),
        lambda: np.asarray(numbers()),
        lambda: numbers().bfloat16().cpu().numpy(),
    ],
)
def test_code_that_mixes_devices_fails(mix):
    """What the simulated device must refuse as the real one does, and so what the others show."""
    with pytest.raises((RuntimeError, TypeError)):
        mix()


def test_what_may_mix_devices_works():
    there = numbers() * torch.tensor(2.0)
    there[0] = torch.ones(3)
    there = there[torch.tensor([0, 1, 1])].to(torch.float64)
    there.add_(torch.tensor(1.0))
    assert there.device == numbers().device
    assert there.tolist() == [[2.0, 2.0, 2.0], [7.0, 9.0, 11.0], [7.0, 9.0, 11.0]]
    assert torch.ones(2, 3).copy_(numbers()).sum().item() == 15
    assert there.cpu().numpy().shape == (3, 3)


SHORT = ["supervised.epochs=1", "retrain.epochs=1"]
EVERYTHING = [
    "supervised={epochs: 1, consistency: 1, accumulate: 2, batch_size: 4}",
    "retrain={epochs: 1, batch_size: 4, weight: cisc_map, learn_partners: true, "
    "feature_dropout: 0.5, threshold: 0.2}",
    "pseudo_label={scales: [0.75, 1.0], flip: true, adjustment: 0.5, threshold: 0.2}",
    "inference={window: {size: 40, weighting: gaussian}, long_side: 60}",
    "ohem={threshold: 0.7, min_kept: 500}",
    "panels={images: 1, every: 1, truth: truth.txt}",
]


@pytest.mark.exhaustive
def test_every_stage_does_a_step(run):
    assert (run("all", *EVERYTHING) / "results.json").is_file()


OPTIONS = [
    ["precision=fp32", "select.score=stability"],
    ["precision=fp16"],
    ["optimizer.name=adamw", "retrain.mix=cutout", "cache=ram"],
    ["retrain={labels: average, threshold: 0.2, views: 2}"],
    pytest.param(["model.compile=true"], marks=needs_cuda),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("words", OPTIONS, ids=" ".join)
def test_every_setting_trains(run, words):
    assert (run("quick", *SHORT, *words) / "results.json").is_file()


@pytest.mark.exhaustive
def test_the_same_command_gives_the_same_bits_and_so_does_a_stopped_one(run, monkeypatch):
    first = run("first")
    assert_same(first, run("second"))

    step_done, done = fitting.Progress.step_done, []

    def stop_twice(self):
        done.append(None)
        if len(done) in (5, 9):  # in stage 1 and in stage 4
            signal.raise_signal(signal.SIGTERM)
        step_done(self)

    monkeypatch.setattr(fitting.Progress, "step_done", stop_twice)
    for _ in range(2):
        with pytest.raises(Stopped):
            run("stopped")
    assert_same(first, run("stopped"))


NETWORKS = {**FAMILIES, "PSPNet": ("pspnet", "resnet18"), "DeepLabV2": ("deeplabv2", "resnet18")}
MANTISSA = {"fp32": 23, "tf32": 10}  # bits of the factors of products


def rounded(values, bits):
    """Keep so many bits of the mantissa."""
    fraction, exponent = torch.frexp(values)
    return torch.ldexp((fraction * 2 ** (bits + 1)).round() / 2 ** (bits + 1), exponent)


def difference(output, expected):
    """The larger one of logits and features, a share of their length."""
    pairs = zip(output, expected, strict=True)
    return max(((one.cpu() - other).norm() / other.norm()).item() for one, other in pairs)


@pytest.mark.parametrize("arithmetic", ["fp32", pytest.param("tf32", marks=needs_cuda)])
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.exhaustive if name == "Xception" else ())
        for name in NETWORKS
    ],
)
@torch.no_grad()
def test_networks_answer_as_on_the_cpu(family, arithmetic):
    """Up to ten times what this arithmetic costs the same network on the CPU."""
    torch.manual_seed(0)
    net = with_statistics(build_model(*NETWORKS[family], 7, 16)).eval()
    images = torch.randn(2, 3, 65, 97)
    exact, coarse = deepcopy(net).double(), deepcopy(net)
    for module in coarse.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.copy_(rounded(module.weight, MANTISSA[arithmetic]))
            round_input = partial(rounded, bits=MANTISSA[arithmetic])
            module.register_forward_pre_hook(lambda _, given, to=round_input: (to(given[0]),))
    expected = exact(images.double())
    limit = 10 * difference(coarse(images), expected)
    allowed = arithmetic == "tf32"
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=allowed):
        there = freeze(net, Device("cuda", "fp32"))(images.to("cuda"))
    assert difference(there, expected) < limit


@pytest.fixture(scope="module")
def checkpoint(finished):
    return finished[0] / "6_retrain" / "checkpoint.pth"


THERE = ["device=cuda", "precision=bf16"]


@pytest.mark.exhaustive
def test_eval_scores_and_compares(checkpoint, answer, tmp_path):
    file, masks = tmp_path / "eval.json", tmp_path / "masks"
    answer(evaluation, checkpoint, *THERE, "--json", file, "--save-masks", masks)
    assert len(list(masks.rglob("*.png"))) == 4
    first = checkpoint.parents[1] / "1_supervised" / "checkpoint.pth"
    printed = answer(evaluation, first, checkpoint, *THERE, "inference.flip=true")
    assert any("mIoU" in line for line in printed)
    here = json.loads((checkpoint.parents[1] / "results.json").read_text())
    assert json.loads(file.read_text())["miou"] == pytest.approx(here["miou"], abs=0.02)


def test_eval_diagnoses_a_run(checkpoint, answer, demo_root, tmp_path):
    run = shutil.copytree(checkpoint.parents[1], tmp_path / "run")
    believe_votes(run)
    answer(evaluation, run, "--diagnose", demo_root / "truth.txt", *THERE)
    weights = json.loads((run / "diagnosis.json").read_text())["weights"]
    assert {"confidence", "probability by both"} <= weights.keys()


@pytest.mark.exhaustive
def test_eval_segments_and_exports(checkpoint, answer, demo_root, tmp_path):
    folder = demo_root / "JPEGImages"
    answer(evaluation, checkpoint, *THERE, "--images", folder, "--out", tmp_path / "out")
    assert len(list((tmp_path / "out" / "masks").rglob("*.png"))) == len(list(folder.iterdir()))
    for name in ("net.safetensors", "net.pt2"):
        answer(evaluation, checkpoint, *THERE, "--export", tmp_path / name)
        assert (tmp_path / name).is_file()


def test_segmenter_takes_tensors_of_both_devices(checkpoint, tmp_path):
    net = Segmenter.load(checkpoint, device="cuda", precision="bf16")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    mask, confidence = net(pixels)
    assert (mask.dtype, confidence.dtype) == (np.uint8, np.float32)
    here = torch.from_numpy(pixels).permute(2, 0, 1)
    for image in (here, here.to("cuda"), here.to("cuda").float() / 255):
        ids, _ = net(image)
        assert ids.device.type == "cuda"
        assert np.mean(ids.cpu().numpy() == mask) > 0.99
        assert net.picture(ids).size == (56, 40)
    net.save(tmp_path / "again.pth")
    again = Segmenter.load(tmp_path / "again.pth", device="cpu")
    assert same(again.net.state_dict(), {k: v.cpu() for k, v in net.net.state_dict().items()})


def label(stage, net, splits, samples):
    train.write_pseudo_labels(stage, train.Labeling(net, None), splits, samples)


def select(stage, net, splits, samples):
    rule = QueryRule.of(stage.config.query, KINDS["demo"])
    index = build_query_index(splits.labeled, rule)
    train.select(stage, net, splits._replace(unlabeled=samples), samples, index)


def rank(stage, net, splits, samples):
    """Stage 3 of ST++, by earlier checkpoints."""
    score = stage.config.select.model_copy(update={"score": "stability"})
    config = stage.config.model_copy(update={"select": score})
    earlier = stage.folder / "teacher"
    earlier.mkdir(parents=True)
    for number in (1, 2):
        shutil.copy(net / "checkpoint.pth", earlier / f"earlier_{number}.pth")
    splits = splits._replace(unlabeled=samples)
    train.select(replace(stage, config=config), earlier, splits, samples, None)


def predict(stage, net, splits, samples):
    net = Segmenter.load(net / "checkpoint.pth", device="cuda")
    loader = whole_images(stage.config, samples)
    opened = net.predict, loader
    keep_predictions(stage.folder, "6_retrain", "", samples, KINDS["demo"], lambda: opened)


@pytest.mark.skipif(REAL, reason="a real device does not count what waits for it")
@pytest.mark.parametrize("work", [label, select, predict, rank], ids=lambda work: work.__name__)
def test_the_cpu_waits_for_batches_not_for_images(cuda, work, checkpoint, splits, tmp_path):
    settings = ["inference.batch_size=8", "device=cuda", "workers=0", "panels.images=0"]
    config = Segmenter.load(checkpoint, settings).config
    waits = []
    for count in (2, 4):
        folder = tmp_path / f"stage{count}"
        watch, device = Stopwatch(folder / "seconds"), Device("cuda", "fp32")
        stage = Stage("stage", folder, config, device, Log(tmp_path), watch)
        cuda.clear()
        work(stage, checkpoint.parents[1] / "1_supervised", splits, splits.val[:count])
        waits.append(sum(cuda.values()))
    assert waits[0] == waits[1] > 0


@needs_cuda
def test_torchrun_takes_nccl(demo_root, tmp_path, tiny_settings, run_program):
    words = [*tiny_settings(demo_root, tmp_path), "device=cuda"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1)
    done = run_program(*torchrun, "train.py", "--config", "demo.yaml", *words, "name=one")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one" / "results.json").is_file()
