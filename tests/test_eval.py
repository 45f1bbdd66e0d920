"""eval.py on the checkpoint of a whole run, as a user types it."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import believe_votes
from PIL import Image

pytestmark = pytest.mark.slow  # or exhaustive


def weights_file(run):
    return run / "6_retrain" / "checkpoint.pth"


def test_eval_prints_what_training_printed(finished, tmp_path, run_program):
    run, _ = finished
    words = [weights_file(run), "--json", tmp_path / "eval.json"]
    done = run_program("eval.py", *words, "--save-masks", tmp_path / "masks")
    assert done.returncode == 0, done.stderr
    results = json.loads((run / "results.json").read_text())
    again = json.loads((tmp_path / "eval.json").read_text())
    assert again["miou"] == results["miou"]
    assert again["per_class_iou"] == results["per_class_iou"]
    assert again["stages"]["6_retrain"]["miou"] == results["miou"]
    assert f"{100 * results['miou']:.2f}" in done.stdout
    assert len(list((tmp_path / "masks").rglob("*.png"))) == 4


@pytest.mark.exhaustive
def test_a_checkpoint_goes_through_a_peers_format_and_back(
    finished, tmp_path, run_program, demo_root, tiny_settings
):
    """UniMatch's format: {"model": ...} with ``module.`` prefixes, and no config."""
    run, _ = finished
    own = torch.load(weights_file(run), weights_only=True)
    peer = {"model": {f"module.{key}": value for key, value in own["model"].items()}}
    torch.save(peer, tmp_path / "unimatch.pth")
    back = {k.removeprefix("module."): v for k, v in peer["model"].items()}
    torch.save({**own, "model": back}, tmp_path / "back.pth")
    foreign = ["--config", "demo.yaml", *tiny_settings(demo_root, tmp_path)]
    scores = []
    for name, words in (("unimatch.pth", foreign), ("back.pth", [f"dataset.root={demo_root}"])):
        done = run_program("eval.py", tmp_path / name, *words, "--json", tmp_path / "out.json")
        assert done.returncode == 0, done.stderr
        scores.append(json.loads((tmp_path / "out.json").read_text())["miou"])
    expected = json.loads((run / "results.json").read_text())["miou"]
    assert scores == [expected, expected]


def test_a_folder_of_pictures_is_segmented_upright(finished, tmp_path, run_program):
    """A camera held sideways says so in its file; viewers, and so masks, turn the picture."""
    photos = tmp_path / "photos"
    (photos / "trip").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    picture, turned = Image.fromarray(pixels), Image.Exif()
    picture.save(photos / "as_seen.png")
    turned[0x0112] = 6  # turn by 90 degrees clockwise to view
    picture.transpose(Image.Transpose.ROTATE_90).save(photos / "sideways.png", exif=turned)
    Image.new("L", (70, 41), 90).save(photos / "grey.png")
    Image.new("CMYK", (33, 64)).save(photos / "trip" / "print.jpg")
    Image.new("RGBA", (64, 48)).save(photos / "trip" / "clear.webp")
    (photos / "notes.txt").write_text("no picture")
    (photos / "._a.jpg").write_text("of macOS")
    (photos / "broken.jpg").write_bytes((photos / "as_seen.png").read_bytes()[:999])
    out = tmp_path / "out"
    words = ["--images", photos, "--out", out, "inference.batch_size=2"]
    done = run_program("eval.py", weights_file(finished[0]), *words)
    assert done.returncode == 1, done.stderr
    assert "5 masks, 5 overlays" in done.stdout
    assert f"1 pictures left out:\n{photos / 'broken.jpg'}: cannot read" in done.stdout
    masks = [np.asarray(Image.open(out / f"masks/{name}.png")) for name in ("as_seen", "sideways")]
    assert np.array_equal(*masks)
    for name, size in (("grey", (70, 41)), ("trip/print", (33, 64)), ("trip/clear", (64, 48))):
        with Image.open(out / "masks" / f"{name}.png") as mask:
            assert (mask.mode, mask.size) == ("P", size)
            assert np.asarray(mask).max() < 7
        with Image.open(out / "overlays" / f"{name}.jpg") as overlay:
            assert overlay.size == size
    assert (out / "legend.png").is_file()


NAMES = {"teacher", "confidence", "cisc_map", "class anchors", "both", "probability by both"}


def test_a_run_is_diagnosed_by_true_masks(finished, demo_root, run_program, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    believe_votes(run)
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}
    copy = tmp_path / "diagnosis.json"
    done = run_program("eval.py", run, "--diagnose", demo_root / "truth.txt", "--json", copy)
    assert done.returncode == 0, done.stderr
    assert copy.read_bytes() == (run / "diagnosis.json").read_bytes()
    for part in ("labels of 2_pseudo_label: 10", "labels of 5_relabel: 5", "class anchors"):
        assert part in done.stdout
    rows = [(line[:20].strip(), line[20:].split()) for line in done.stdout.splitlines()]
    numbers = {name: list(map(float, words)) for name, words in rows if name in NAMES}
    assert numbers.keys() == NAMES
    assert all(0 <= number <= 1 for row in numbers.values() for number in row)
    assert -1 <= float(done.stdout.rsplit(" ", 1)[1]) <= 1
    kept = run / "diagnosis.json"
    found = json.loads(kept.read_text())
    kept.unlink()
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()} == before
    quality = found["weights"]["confidence"]
    assert [f"{quality[key]:.3f}" for key in ("auroc", "calibration_error")] == [
        f"{number:.3f}" for number in numbers["confidence"][:2]
    ]
    assert sum(group["share"] for group in quality["curve"]) == pytest.approx(1)
    assert set(found["labels"]) == {"2_pseudo_label", "5_relabel"}
    done = run_program("eval.py", run, "--diagnose", demo_root / "labeled.txt")
    assert done.returncode == 2
    assert "names no unlabeled image" in done.stderr


@pytest.mark.exhaustive
def test_a_run_is_diagnosed_in_bf16(finished, demo_root, run_program):
    words = ["--diagnose", demo_root / "truth.txt", "precision=bf16"]
    done = run_program("eval.py", finished[0], *words)
    assert done.returncode == 0, done.stderr
