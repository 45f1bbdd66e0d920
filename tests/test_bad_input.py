import pytest
import torch
from conftest import ROOT, refusal
from PIL import Image

import train as train_program
from model import fitting
from utils import checkpoint
from utils.config.batches import refuse_batch_sizes
from utils.config.reading import read_config
from utils.errors import UserError


@pytest.fixture
def train(complaint, demo_overrides, demo_copy):
    """``train.py --config demo.yaml`` on the copy of the demo set, with more settings."""
    settings = [*demo_overrides, f"dataset.root={demo_copy}"]
    return lambda *more: complaint(train_program, "--config", "demo.yaml", *settings, *more)


BAD_DATA = [
    (
        lambda root: (root / "labeled.txt").write_text("JPEGImages/0000.jpg"),
        ["dataset.labeled", "JPEGImages/0000.jpg", "has no mask", "name"],
    ),
    (
        lambda root: (root / "SegmentationClass/0001.png").unlink(),
        ["0001.png", "no such file", "correct the list or dataset.root"],
    ),
    (
        lambda root: Image.new("L", (64, 47)).save(root / "SegmentationClass/1001.png"),
        ["1001.png", "47 x 64", "1001.jpg", "48 x 64", "must agree"],
    ),
]


@pytest.fixture
def no_step(monkeypatch):
    """Fail where an iteration is done."""

    def trained(*_):
        raise AssertionError("trained before it looked")

    monkeypatch.setattr(fitting.Optimization, "step", trained)
    return trained


@pytest.mark.parametrize(("spoil", "told"), BAD_DATA)
def test_bad_data(train, demo_copy, spoil, told):
    spoil(demo_copy)
    line = train()
    assert [part for part in told if part not in line] == []


def test_unlabeled_image_that_cannot_be_read_is_found_before_anything_trains(
    train, demo_copy, monkeypatch, no_step
):
    """And not hours later, when stage 2 opens it."""
    monkeypatch.setattr(train_program, "fit", no_step)
    (demo_copy / "JPEGImages/0009.jpg").write_text("not a picture")
    assert "0009.jpg: cannot read this picture" in train()


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("retrain.epochs=many", ["command line", "retrain.epochs", "'many'", "integer"]),
        ("dataset.root=gone", ["dataset.root: gone is not a folder", "python -m dataset.demo"]),
        ("dataset.kind=demos", ["dataset.kind", "'demos'", "demo", "custom"]),
        ("dataset.unlabeled=no.txt", ["dataset.unlabeled", "no.txt is not in"]),
        ("model.name=unet", ["model.name", "'unet'", "deeplabv3plus"]),
        ("model.backbone=vgg", ["model.backbone", "'vgg'", "resnet18"]),
        ("query.exclude=[sky]", ["query.exclude", "'sky'", "background"]),
        ("supervised.batch_size=13", ["supervised.batch_size", "13", "12", "lower"]),
        ("retrain.batch_size=6", ["retrain.batch_size", "6", "5", "lower"]),
        ("model.pretrained=x.pth", ["x.pth: no such file", "model.pretrained"]),
        ("outdir=/dev/null", ["/dev/null/demo/lock: cannot write this file"]),
        ("device=cuda:99", ["device", "'cuda:99'", "auto, cpu"]),
        ("device=meta", ["device", "'meta'", "auto, cpu"]),
        ("precision=fp16", ["precision", "'fp16'", "fp32 or bf16"]),
    ],
)
def test_bad_settings(train, monkeypatch, no_step, setting, told):
    if "batch_size" not in setting:
        monkeypatch.setattr(train_program, "fit", no_step)
    line = train(setting)
    assert [part for part in told if part not in line] == []


def test_a_truncated_unlabeled_image_is_found_before_anything_trains(
    train, demo_copy, monkeypatch, no_step
):
    monkeypatch.setattr(train_program, "fit", no_step)
    path = demo_copy / "JPEGImages" / "0009.jpg"
    path.write_bytes(path.read_bytes()[:700])  # its header is whole
    assert f"{path}: cannot read this picture" in train(f"dataset.root={demo_copy}")


def test_backbone_weights_that_are_missing_or_do_not_fit(train, monkeypatch, tmp_path):
    monkeypatch.setattr("model.networks.weights.PRETRAINED", tmp_path)
    path, line = tmp_path / "resnet18.pth", train("model.pretrained=auto")
    assert f"{path}: no weights for resnet18" in line
    assert "pretrained/README.md" in line
    path.write_bytes(b"PK\3\4 half of it")
    assert f"{path}: not a whole checkpoint" in train(f"model.pretrained={path}")
    checkpoint.save(path, {"conv1.weight": torch.zeros(64, 3, 7, 7)})
    assert f"{path}: weights of another network" in train(f"model.pretrained={path}")


def test_program_as_typed(demo_copy, tmp_path, run_program):
    for path in demo_copy.glob("JPEGImages/00*.jpg"):
        path.write_bytes(path.read_bytes()[:700])
    settings = [f"dataset.root={demo_copy}", "workers=1", "device=cpu", "outdir=out"]
    settings += ["supervised.batch_size=4", "retrain.batch_size=4"]
    done = run_program(ROOT / "train.py", "--config", "demo.yaml", *settings, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {demo_copy}/JPEGImages/")


def test_the_way_out_of_a_large_batch_leads_out(splits):
    def check(splits, *words):
        config = read_config("demo.yaml", ["supervised.batch_size=2", "retrain.mix=none", *words])
        refuse_batch_sizes(config, len(splits.labeled), len(splits.unlabeled))

    few = splits._replace(unlabeled=splits.unlabeled[:2])  # stage 4 has one of them
    assert "give it a list of more images" in refusal(check, few, "retrain.batch_size=2")
    check(few, "stages=[1,2,6]", "retrain.batch_size=2")
    check(few, "stages=[1]", "retrain.batch_size=9")


def test_cutmix_needs_two_images_in_each_process(monkeypatch):
    monkeypatch.setattr("utils.config.batches.world", lambda: 4)
    words = ["retrain.batch_size=4", "supervised.batch_size=4"]
    with pytest.raises(UserError, match="4 gives 4 processes less than two images each"):
        refuse_batch_sizes(read_config("demo.yaml", words), 6, 10)
    refuse_batch_sizes(read_config("demo.yaml", [*words, "retrain.mix=none"]), 6, 10)
