import errno
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image

import eval as eval_program
from model import network_of
from utils import checkpoint
from utils.config.reading import read_config
from utils.files import write_text
from utils.run.comparison import portable


@pytest.fixture(scope="module")
def trained(demo_root, tmp_path_factory) -> Path:
    """A checkpoint as ``train.py`` writes it, of random weights."""
    settings = [f"dataset.root={demo_root}", "workers=0", "device=cpu", "precision=fp32"]
    config, run = read_config("demo.yaml", settings), tmp_path_factory.mktemp("run")
    path = run / "1_supervised" / "c.pth"
    write_text(run / "config.yaml", yaml.safe_dump(config.model_dump(mode="json")))
    torch.manual_seed(0)
    content = {"config": portable(config), "stage": "1_supervised", "epoch": 1}
    checkpoint.save(path, {**content, "model": network_of(config.model, 7, None).state_dict()})
    return path


OTHER = "weights of another network"


@pytest.mark.parametrize(
    ("spoilt", "told"),
    [
        (lambda _: {"conv1.weight": torch.zeros(1)}, ["holds no config", "--config"]),
        (lambda _: [torch.zeros(1)], ["holds a list"]),
        (lambda content: {**content, "model": torch.zeros(1)}, ["weights"]),
        (lambda content: {**content, "model": dict(enumerate(content["model"].values()))}, [OTHER]),
    ],
)
def test_bad_checkpoint(complaint, trained, tmp_path, spoilt, told):
    path = tmp_path / "c.pth"
    torch.save(spoilt(checkpoint.load(trained)), path)
    line = complaint(eval_program, path)
    assert [part for part in [str(path), *told] if part not in line] == []


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("model.backbone=resnet34", [OTHER, "missing", "check model.name"]),
        ("dataset.kind=pascal", ["was trained for 7 classes", "has 21", "--reset-classifier"]),
        ("dataset.root=nowhere", ["dataset.root", "nowhere is not a folder"]),
        ("dataset.val=no.txt", ["dataset.val", "no.txt is not in"]),
        ("inference.long_sid=3", ["unknown key", "'inference.long_side'"]),
    ],
)
def test_bad_settings_of_eval(complaint, trained, setting, told):
    line = complaint(eval_program, trained, setting)
    assert [part for part in told if part not in line] == []


@pytest.mark.parametrize(
    ("option", "place", "told"),
    [
        ("--json", "file/x", "file"),
        ("--save-masks", "file/x", "file"),
        (
            "--export",
            "net.tflite",
            "net.tflite: export writes .onnx, .pt2, .pth, .safetensors, or a folder",
        ),
    ],
)
def test_place_that_eval_cannot_write(complaint, trained, tmp_path, option, place, told):
    (tmp_path / "file").write_text("")
    line = complaint(eval_program, trained, option, tmp_path / place)
    assert f"{tmp_path}/{told}" in line


def test_images_of_every_mode_are_converted(trained, demo_copy, tmp_path, answer):
    mask, lines = (demo_copy / "val.txt").read_text().split()[1], []
    picture = Image.open(demo_copy / "JPEGImages" / "1000.jpg")
    for mode in ("L", "CMYK", "RGBA", "P"):
        own = picture.convert(mode)
        for name, content in ((f"{mode}_own", own), (f"{mode}_rgb", own.convert("RGB"))):
            content.save(demo_copy / "JPEGImages" / f"{name}.tif")
            lines.append(f"JPEGImages/{name}.tif {mask}")
    (demo_copy / "val.txt").write_text("\n".join(lines))
    answer(eval_program, trained, f"dataset.root={demo_copy}", "--save-masks", tmp_path / "masks")
    for mode in ("L", "CMYK", "RGBA", "P"):
        own, rgb = (tmp_path / "masks/JPEGImages" / f"{mode}_{end}.png" for end in ("own", "rgb"))
        assert own.read_bytes() == rgb.read_bytes()


def test_program_as_typed(trained, tmp_path, run_program):
    (tmp_path / "c.pth").write_bytes(trained.read_bytes()[:5000])
    done = run_program(ROOT / "eval.py", "c.pth", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: c.pth: not a whole checkpoint")
    assert "again" in line


@pytest.mark.parametrize(
    ("folder", "names", "told"),
    [
        ("in", (), "no picture that Pillow reads"),
        ("in/x.png", (), "no picture that Pillow reads"),  # a folder that is called like one
        ("in", ("a.jpg", "a.png"), "would share its mask"),
    ],
)
def test_folder_of_pictures(complaint, trained, tmp_path, folder, names, told):
    (tmp_path / folder).mkdir(parents=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / name)
    line = complaint(eval_program, trained, "--images", tmp_path / "in", "--out", tmp_path / "out")
    assert told in line


def test_predictions_go_elsewhere(complaint, trained, demo_root, tmp_path):
    photos, root = tmp_path / "masks", demo_root / "masks"
    for out in (photos, photos / "seg", tmp_path):  # the last one's masks would be pictures, too
        line = complaint(eval_program, trained, "--images", photos, "--out", out)
        assert line.startswith("error: --out: ")
    made = tmp_path / "seg" / "overlays" / "a.jpg"  # of an earlier call
    for picture, out in ((photos / "a.png", tmp_path), (made, made.parents[1])):
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48)).save(picture)
        line = complaint(eval_program, trained, "--images", tmp_path / "**" / "*.*", "--out", out)
        assert line.startswith("error: --out: ")
        assert f"would lie where the picture {picture} of --images is read" in line
        picture.unlink()
    data = f"dataset.root={demo_root}"
    for words in (
        ["--save-masks", demo_root],
        ["--save-masks", root],
        ["--json", trained],
        ["--json", demo_root / "val.txt"],
        ["--images", demo_root / "JPEGImages", "--out", demo_root],
    ):
        line = complaint(eval_program, trained, data, *words)
        assert line.startswith(f"error: {words[-2]}: ")
    assert not root.exists()
    words = ["--images", photos, "--out", photos, "--export", tmp_path / "n.pt2"]
    assert "--export and --images do not go together" in complaint(eval_program, trained, *words)


def test_what_the_system_does_not_let_read_is_told(complaint, trained, monkeypatch):
    def closed(_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(zipfile, "is_zipfile", closed)
    line = complaint(eval_program, trained)
    assert line.startswith(f"error: {trained}: cannot read this file (Permission denied); ")


def test_weights_that_are_not_finite_are_refused(complaint, trained, tmp_path):
    content = checkpoint.load(trained)
    content["model"]["classifier.bias"][0] = float("nan")
    torch.save(content, tmp_path / "c.pth")
    assert "holds weights that are not finite" in complaint(eval_program, tmp_path / "c.pth")


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, 2).to_sparse(), torch.zeros(2, device="meta")], ids=["sparse", "meta"]
)
def test_tensors_without_numbers_are_refused(complaint, trained, tmp_path, tensor):
    content = checkpoint.load(trained)
    content["model"]["classifier.bias"] = tensor
    torch.save(content, tmp_path / "c.pth")
    assert "holds sparse tensors, or no numbers" in complaint(eval_program, tmp_path / "c.pth")


def test_a_stage_that_is_no_text_is_written_as_text(answer, trained, demo_root, tmp_path):
    content = {**checkpoint.load(trained), "stage": ["4", {}]}
    torch.save(content, tmp_path / "c.pth")
    words = [f"dataset.root={demo_root}", "workers=0", "--json", tmp_path / "out.json"]
    answer(eval_program, tmp_path / "c.pth", *words)
    assert list(json.loads((tmp_path / "out.json").read_text())["stages"]) == ["['4', {}]"]


def test_a_checkpoint_beside_another_programs_config(complaint, trained, tmp_path):
    (tmp_path / "config.yaml").write_text("theirs: 1")
    (tmp_path / "weights").mkdir()
    path = Path(shutil.copy(trained, tmp_path / "weights"))
    assert "dataset.root: unknown is not a folder" in complaint(eval_program, path)
    line = complaint(eval_program, path, "--images", tmp_path / "in", "--out", tmp_path / "out")
    assert "no picture that Pillow reads" in line


def test_a_changed_bit_is_found(complaint, trained, tmp_path):
    content = bytearray(trained.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "c.pth").write_bytes(content)
    assert "not a whole checkpoint" in complaint(eval_program, tmp_path / "c.pth")
