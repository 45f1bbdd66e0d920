"""Encoders of votes: their images, tiles, memory, and the names that users give them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.cisc.voting_encoder import VotingEncoder, encode_tiles, renormalize
from tests.conftest import refusal
from train import train
from utils import IMAGENET, Preprocessing
from utils.config.reading import read_config
from utils.device import Device

LITE0 = "timm/tf_efficientnet_lite0"


@pytest.mark.parametrize("size", [1, 40, 64, 1000])
def test_tiles_have_the_features_of_the_whole_image(size):
    """Of an encoder that sees less far than the margins: the same numbers, in the same places."""
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 4, stride=4), torch.nn.Conv2d(5, 6, 3, padding=1)
    )
    images, seen = torch.randn(2, 3, 72, 100), []

    def encode(tile):
        seen.append(max(tile.shape[-2:]))
        return encoder(tile)

    with torch.no_grad():
        found = encode_tiles(encode, images, size, 4)
        torch.testing.assert_close(found, encoder(images))
    assert max(seen) <= max(size, 4 * (2 * 3 + 1))  # a place and its margins, at least
    assert len(seen) == 1 or size < 1000


def test_another_encoder_gets_its_images_as_it_wants_them(demo_root, tmp_path, tiny_settings):
    """Votes of Lite0 do not depend on whose images are normalised: a ResNet's or its own."""
    words = tiny_settings(demo_root, tmp_path)
    own = f"model={{backbone: {LITE0}, output_stride: 32, pretrained: auto}}"
    device, picture = Device("cpu", "fp32"), torch.rand(1, 3, 64, 96)
    ours = VotingEncoder(read_config("demo.yaml", [*words, own]), device, LITE0)
    theirs = VotingEncoder(read_config("demo.yaml", words), device, LITE0)
    lite = Preprocessing((127 / 255,) * 3, (128 / 255,) * 3)
    normal = [
        (picture - torch.tensor(how.mean).view(3, 1, 1)) / torch.tensor(how.std).view(3, 1, 1)
        for how in (lite, IMAGENET)
    ]
    torch.testing.assert_close(renormalize(normal[1], IMAGENET, lite), normal[0])
    maps = ours(normal[0], 2.0), theirs(normal[1], 2.0)
    assert maps[0].shape == (1, 320, *ours.grid((64, 96), 2.0)) == (1, 320, 4, 6)
    torch.testing.assert_close(*maps, rtol=1e-3, atol=1e-3)
    assert ours.name == LITE0
    assert theirs.name.startswith(f"{LITE0} (/")
    assert ours.channels == 320


@pytest.mark.parametrize(
    ("voter", "told"),
    [("timm/tf_efficientnet_lite9", "tf_efficientnet_lite"), ("resnet19", "resnet18")],
)
def test_voters_that_are_not_there_are_refused_first(
    demo_root, tmp_path, tiny_settings, voter, told
):
    words = [*tiny_settings(demo_root, tmp_path), f"pseudo_label.voters=[{voter}]"]
    line = refusal(train, read_config("demo.yaml", [*words, "name=r"]))
    assert line.startswith("pseudo_label.voters: ")
    assert told in line
    assert not (tmp_path / "r" / "1_supervised").exists()


@pytest.mark.slow
def test_voters_that_are_not_there_leave_a_finished_run_as_it_is(
    finished, demo_root, tmp_path, tiny_settings
):
    shutil.copytree(finished[0], tmp_path / "whole")
    words = [*tiny_settings(demo_root, tmp_path), "name=whole", "pseudo_label.voters=[resnet19]"]
    line = refusal(train, read_config("demo.yaml", words), from_stage=2)
    assert line.startswith("pseudo_label.voters: ")
    assert (tmp_path / "whole" / "6_retrain" / "checkpoint.pth").is_file()


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("window", ["null", "{size: 512}"])
def test_memory_is_about_what_was_said(demo_root, tmp_path, tiny_settings, window):
    words = [*tiny_settings(demo_root, tmp_path), f"inference.window={window}"]
    script = f"""
import torch
from model.cisc.voting_encoder import VotingEncoder
from utils.config.reading import read_config
from utils.device import Device
encoder = VotingEncoder(read_config("demo.yaml", {words!r}), Device("cpu", "fp32"), "{LITE0}")
said, image = encoder.estimate_memory((1000, 1500), 2.0), torch.rand(1, 3, 1000, 1500)
def memory(key):  # bytes; not ru_maxrss, which begins with the peak of the parent process
    line, = (x for x in open("/proc/self/status") if x.startswith(key))
    return 1024 * int(line.split()[1])
before = memory("VmRSS:")
with torch.inference_mode():
    encoder(image, 2.0)
print(said / (memory("VmHWM:") - before))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert 0.7 < float(done.stdout) < 1.4, done.stderr
