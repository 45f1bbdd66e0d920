"""What only a CUDA device can show. Skipped where there is none: CI has none."""

import signal

import pytest
import torch
from conftest import same

import train
from model import network_of
from model.ops.frozen import freeze
from utils.config.reading import read_config
from utils.device import Device
from utils.errors import Stopped

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(autouse=True)
def deterministic():
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield


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


OPTIONS = [
    ["precision=fp32", "retrain.weight=bank"],
    ["precision=fp16"],
    ["precision=bf16", "ohem={threshold: 0.7, min_kept: 500}"],
    ["precision=bf16", "supervised.accumulate=2", "retrain.accumulate=2"],
    ["model.compile=true"],
    ["retrain={labels: average, threshold: 0.2, threshold_by_class: true, views: 2}"],
    ["retrain={mix: queried, learn_queried: true, feature_dropout: 0.5, threshold: 0.2}"],
]


@pytest.mark.parametrize("words", OPTIONS, ids=" ".join)
def test_every_setting_trains(run, words):
    assert (run("quick", *words) / "results.json").is_file()


def test_the_same_command_gives_the_same_bits_and_so_does_a_stopped_one(run, monkeypatch):
    first = run("first")
    assert_same(first, run("second"))

    step_done, done = train.Progress.step_done, []

    def stop_twice(self):
        done.append(None)
        if len(done) in (5, 9):  # in stage 1 and in stage 4
            signal.raise_signal(signal.SIGTERM)
        step_done(self)

    monkeypatch.setattr(train.Progress, "step_done", stop_twice)
    for _ in range(2):
        with pytest.raises(Stopped):
            run("stopped")
    assert_same(first, run("stopped"))


@pytest.mark.parametrize("name", ["deeplabv3plus", "pspnet", "deeplabv2"])
def test_networks_answer_as_on_the_cpu(name):
    words = [f"model.name={name}", "model.output_stride=8"]
    net = network_of(read_config("demo.yaml", words).model, 7, pretrained=None).eval()
    images = torch.randn(2, 3, 65, 97)
    with torch.inference_mode():
        expected = net(images)
        there = freeze(net, Device("cuda", "fp32"))(images.cuda())
    for ours, theirs in zip(there, expected, strict=True):
        error = (ours.cpu() - theirs).norm() / theirs.norm()
        assert error < 2e-3  # convolutions round to tf32


def test_torchrun_takes_nccl(demo_root, tmp_path, tiny_settings, run_program):
    words = [*tiny_settings(demo_root, tmp_path), "device=cuda"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1)
    done = run_program(*torchrun, "train.py", "--config", "demo.yaml", *words, "name=one")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one" / "results.json").is_file()
