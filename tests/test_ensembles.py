"""Several networks at once, their probabilities in files, and masks of other programs."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal
from PIL import Image

import eval as eval_program
from dataset.lists import find_pictures
from model import Segmenter
from utils.config.reading import read_config


@pytest.fixture(scope="module")
def nets(demo_root, tmp_path_factory):
    """The folder of two checkpoints of random weights, one.pth and two.pth."""
    folder = tmp_path_factory.mktemp("nets")
    words = [f"dataset.root={demo_root}", "workers=0", "device=cpu", "precision=fp32"]
    config = read_config("demo.yaml", [*words, "model.backbone=resnet18", "model.pretrained=null"])
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        net = eval_program.Segmenter(_network(config), config)
        net.save(folder / f"{name}.pth")
    return folder


def _network(config):
    from model import network_of

    return network_of(config.model, 7, None)


def test_an_ensemble_averages_probabilities(nets, demo_root):
    files, words = [nets / "one.pth", nets / "two.pth"], [f"dataset.root={demo_root}"]
    one, two = (Segmenter.load(file, words) for file in files)
    both, image = Segmenter.load(files, words), torch.randn(1, 3, 48, 64)
    expected = (one.predict(image, (48, 64)) + two.predict(image, (48, 64))) / 2
    assert torch.equal(both.predict(image, (48, 64)), expected)
    assert "several networks; save each" in refusal(both.save, nets / "both.pth")
    one.classes = ("other",)
    assert "other classes" in refusal(Segmenter.ensemble, [one, two])


def test_an_ensemble_of_a_network_with_itself_scores_as_it(nets, demo_root, answer):
    words = f"dataset.root={demo_root}", "workers=0"
    one, copy = nets / "one.pth", shutil.copy(nets / "one.pth", nets / "copy.pth")
    alone = answer(eval_program, one, *words)
    assert answer(eval_program, one, copy, "--ensemble", *words) == alone


def test_probabilities_and_confidence_are_saved(nets, demo_root, answer, tmp_path):
    picture, words = demo_root / "JPEGImages" / "0000.jpg", [f"dataset.root={demo_root}"]
    for what in ("probabilities", "confidence"):
        typed = "--images", picture, "--out", tmp_path, "--save", what
        answer(eval_program, nets / "one.pth", *words, "workers=0", *typed)
    probabilities = np.load(tmp_path / "probabilities" / "0000.npy")
    assert probabilities.shape == (7, 48, 64)
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-5)
    confidence = np.asarray(Image.open(tmp_path / "confidence" / "0000.png"))
    np.testing.assert_allclose(confidence / 65535, probabilities.max(axis=0), atol=1e-5)
    ids = np.asarray(Image.open(tmp_path / "masks" / "0000.png"))
    assert np.array_equal(ids, probabilities.argmax(axis=0))


def test_pictures_are_a_file_a_folder_or_a_pattern(demo_root):
    folder = demo_root / "JPEGImages"
    names = [sample.name for sample in find_pictures(folder)]
    assert [sample.name for sample in find_pictures(folder / "0003.jpg")] == ["0003.jpg"]
    assert [sample.name for sample in find_pictures(folder / "*.jpg")] == names
    assert "no such file or folder" in refusal(find_pictures, folder / "x*.jpg")


def test_masks_of_any_program_are_scored(nets, demo_root, answer, complaint, tmp_path):
    words = "--config", "demo.yaml", f"dataset.root={demo_root}", "workers=0"
    groups = "--groups", r"\d(?=\.jpg)"
    answer(
        eval_program,
        nets / "one.pth",
        *words[2:],
        *groups,
        "--save-masks",
        tmp_path / "a",
        "--json",
        tmp_path / "a.json",
    )
    scored = "--masks", tmp_path / "a", *words
    said = answer(eval_program, *scored, *groups, "--json", tmp_path / "b.json")
    one, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    for key in ("per_class_iou", "per_class_dice", "by_group"):
        assert other[key] == one[key]
    assert one["by_group"]["groups"] == 4
    assert "by group: 4 groups; mean without 'background'" in said[-2:]
    told = complaint(eval_program, *scored, "--groups", "patient: ")
    assert "dataset.groups: 'patient: ' finds no group in the name of JPEGImages/" in told
    assert "no regular expression" in complaint(eval_program, *scored, "--groups", "(")
    masks = sorted((tmp_path / "a").rglob("*.png"))
    Image.new("L", (64, 48), 9).save(masks[0])
    assert "holds 255 or no class's id where" in complaint(
        eval_program, "--masks", tmp_path / "a", *words
    )
    Image.new("L", (6, 48)).save(masks[0])
    assert "its size differs from" in complaint(eval_program, "--masks", tmp_path / "a", *words)
    masks[0].unlink()
    line = complaint(eval_program, "--masks", tmp_path / "a", *words)
    assert f"{masks[0]}: no such file; --masks names a folder with a mask of each image" in line


def test_a_module_that_hides_ours_is_named(tmp_path, run_program):
    (tmp_path / "utils.py").write_text("mine = 1")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import model"
    error = run_program("-c", code, cwd=tmp_path).stderr
    assert (
        f"ImportError: {tmp_path}/utils.py is imported as 'utils' in place of {ROOT}/utils" in error
    )
    code = f"import sys; sys.path.insert(0, '{ROOT}'); import model"  # as it advises
    assert run_program("-c", code, cwd=tmp_path).stderr == ""
