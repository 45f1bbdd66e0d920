"""A trained network from Python: what goes in, what comes out, the files it is kept in."""

import gc
import json
import shutil

import huggingface_hub as hub
import numpy as np
import pytest
import torch
from conftest import refusal, same
from PIL import Image

from model import Segmenter
from utils import checkpoint
from utils.panels import encode

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def weights(finished):
    return finished[0] / "6_retrain" / "checkpoint.pth"


@pytest.fixture(scope="module")
def net(weights):
    return Segmenter.load(weights)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (41, 60, 3), dtype=np.uint8)


def test_every_kind_of_image_gives_the_bits_of_eval(net, weights, pixels, tmp_path, run_program):
    (tmp_path / "photos").mkdir()
    photo = tmp_path / "photos" / "a.png"
    Image.fromarray(pixels).save(photo)
    out = tmp_path / "out"
    done = run_program("eval.py", weights, "--images", tmp_path / "photos", "--out", out)
    assert done.returncode == 0, done.stderr
    expected = np.asarray(Image.open(out / "masks" / "a.png"))
    batch = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0)
    confidences = []
    for image in (photo, str(photo), Image.open(photo), pixels, batch, batch[0]):
        mask, confidence = net(image)
        shape = (1, 41, 60) if getattr(image, "ndim", 0) == 4 else (41, 60)
        assert mask.shape == confidence.shape == shape
        assert isinstance(mask, torch.Tensor) == isinstance(image, torch.Tensor)
        assert np.array_equal(np.asarray(mask).reshape(41, 60), expected)
        confidences.append(np.asarray(confidence).reshape(41, 60))
    assert all(np.array_equal(one, confidences[0]) for one in confidences)
    assert confidences[0].dtype == np.float32
    _, of_floats = net(batch / 255)  # within their rounding
    assert np.allclose(of_floats, confidences[:1], atol=1e-4)
    assert 1 / 7 <= confidences[0].min() <= confidences[0].max() <= 1
    drawn = encode(net.overlay(pixels, expected), "JPEG", quality=92)
    assert (out / "overlays" / "a.jpg").read_bytes() == drawn
    assert np.array_equal(np.asarray(net.picture(torch.from_numpy(expected.copy()))), expected)


def test_one_network_is_in_memory(net, weights, pixels):
    def live():
        gc.collect()
        return sum(type(each) is type(net.net) for each in gc.get_objects())

    before = live()
    other = Segmenter.load(weights)
    other(pixels)
    assert live() == before + 1
    assert other.predict.net is other.net


def test_a_picture_is_turned_upright_once(net, pixels, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # turn by 90 degrees clockwise to view
    sideways = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    sideways.save(tmp_path / "s.jpg", exif=turned, quality=95)
    with Image.open(tmp_path / "s.jpg") as picture:
        from_picture, _ = net(picture)
    from_file, _ = net(tmp_path / "s.jpg")
    assert from_picture.shape == (41, 60)
    assert np.array_equal(from_picture, from_file)


def test_views_precision_classes_and_colours_are_arguments(net, weights, pixels):
    names, colours = [f"k{number}" for number in range(7)], [(number, 0, 9) for number in range(7)]
    other = Segmenter.load(
        weights,
        classes=names,
        colours=colours,
        device="cpu",
        precision="fp32",
        scales=[0.5, 1.0],
        flip=True,
        window={"size": 32},
    )
    assert other.classes == tuple(names)
    assert other.config.inference.scales == [0.5, 1.0]
    assert other.config.inference.window.size == 32
    assert net.config.inference.window is None
    assert not np.array_equal(other(pixels)[1], net(pixels)[1])
    assert other.picture(np.full((1, 1), 3)).convert("RGB").getpixel((0, 0)) == (3, 0, 9)
    assert net.classes[0] == "background"
    same_views = Segmenter.load(weights, ["inference.flip=true", "inference.scales=[0.5, 1.0]"])
    wanted = Segmenter.load(weights, flip=True, scales=[0.5, 1.0])
    assert np.array_equal(same_views(pixels)[1], wanted(pixels)[1])


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors", "folder"])
def test_a_network_is_saved_and_read_with_its_config(net, pixels, tmp_path, name):
    place = tmp_path / name
    net.save(place)
    net.save(place)  # over its own
    again = Segmenter.load(place, device="cpu")
    assert same(again.net.state_dict(), net.net.state_dict())
    assert again.config.model == net.config.model
    assert again.classes == net.classes
    assert again.origin == {"stage": "6_retrain", "epoch": 2}
    assert all(map(np.array_equal, again(pixels), net(pixels)))
    if place.is_dir():
        assert {file.name for file in place.iterdir()} == {"config.json", "model.safetensors"}
        kept = json.loads((place / "config.json").read_text())
        assert kept["config"]["model"]["backbone"] == "resnet18"
        assert kept["preprocessing"]["interpolation"] == "bilinear"


@pytest.mark.exhaustive
def test_eval_exports_and_reads_these_files(finished, weights, tmp_path, run_program, demo_root):
    expected = json.loads((finished[0] / "results.json").read_text())
    for name in ("net.safetensors", "folder"):
        done = run_program("eval.py", weights, "--export", tmp_path / name)
        assert done.returncode == 0, done.stderr
        words = [tmp_path / name, f"dataset.root={demo_root}", "--json", tmp_path / "eval.json"]
        done = run_program("eval.py", *words)
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "eval.json").read_text())
        assert found["per_class_iou"] == expected["per_class_iou"]
        assert found["stages"] == {"6_retrain": {"miou": expected["miou"], "epoch": 2}}


def test_the_hub_takes_and_gives_a_folder(net, pixels, tmp_path, monkeypatch):
    made = []

    def upload(repo_id, folder_path):
        shutil.copytree(folder_path, tmp_path / repo_id)
        return "https://hub/commit/1"

    monkeypatch.setattr(hub, "create_repo", lambda name, **keys: made.append((name, keys)))
    monkeypatch.setattr(hub, "upload_folder", upload)
    assert net.push("me/animals", private=True) == "https://hub/commit/1"
    assert made == [("me/animals", {"private": True, "exist_ok": True})]
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: tmp_path / name)
    assert np.array_equal(Segmenter.load("hf:me/animals")(pixels)[0], net(pixels)[0])


def test_a_hub_that_is_not_reached_is_one_line(net, monkeypatch):
    def offline(*_, **__):
        raise hub.errors.OfflineModeIsEnabled("no network\nat all")

    monkeypatch.setattr(hub, "create_repo", offline)
    assert refusal(net.push, "me/x").startswith("me/x: upload failed (no network); check the conn")
    line = refusal(Segmenter.load, "hf:me/no-such-network")
    assert line.startswith("hf:me/no-such-network: the Hugging Face hub gives no such repository (")
    assert "\n" not in line


def test_a_path_that_is_no_checkpoint_never_asks_the_hub(finished, monkeypatch):
    run, _ = finished
    monkeypatch.chdir(run.parent.parent)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    near = f"{run.parent.name}/{run.name}"
    for typed, advice in {
        f"{near}2": f"{run.parent.name} has 'whole', and no 'whole2'",
        f"{near}/6_retrain/checkpoint.pt": f"{near}/6_retrain has 'checkpoint.pth', and no",
        f"{near}/6_retrian/checkpoint.pth": f"{near} has '6_retrain', and no '6_retrian'",
        near: f"name {near}/6_retrain/checkpoint.pth",
        f"{near}/6_retrain": f"name {near}/6_retrain/checkpoint.pth",
        "me/animals": "name a checkpoint.pth of a run, or hf:owner/name on the Hugging Face hub",
        "x.pth": "name a checkpoint.pth of a run, or hf:owner/name on the Hugging Face hub",
    }.items():
        line = refusal(Segmenter.load, typed)
        assert line.startswith(f"{typed}: no such checkpoint; {advice}")


def test_an_upload_that_fails_in_any_way_is_one_line(net, monkeypatch):
    def refuse(*_, **__):  # the hub's libraries for HTTP raise errors of their own
        raise type("ConnectError", (Exception,), {})("name not known")

    monkeypatch.setattr(hub, "create_repo", refuse)
    assert "me/x: upload failed (name not known)" in refusal(net.push, "me/x")


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (np.zeros((4, 4, 4), np.uint8), r"image: an array of uint8, (4, 4, 4); give uint8"),
        (np.zeros((4, 4, 3)), "image: an array of float64"),
        (np.zeros(4, np.uint8), "image: an array of uint8, (4,)"),
        (torch.zeros(1, 4, 4), "image: a tensor of (1, 4, 4); give (images, 3, height, width)"),
        (torch.full((3, 4, 4), 2.0), "give uint8, or floats from 0 to 1"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "a tensor of torch.int64"),
        (torch.zeros(3, 4, 4).to(torch.float8_e4m3fn), "a tensor of torch.float8"),
        (torch.zeros(3, 4, 4).to_sparse(), "give a dense one"),
        (torch.zeros(3, 4, 4, device="meta"), "give a dense one"),
        (torch.nested.nested_tensor([torch.zeros(3, 4, 4)]), "give a dense one"),
        (torch.full((3, 4, 4), float("nan")), "give uint8, or floats from 0 to 1"),
        (torch.zeros(0, 3, 4, 4), "a tensor of (0, 3, 4, 4)"),
        (torch.zeros(3, 0, 4), "a tensor of (3, 0, 4)"),
        (np.zeros((0, 4, 3), np.uint8), "image: has no pixels"),
        (np.zeros((4, 0), np.uint8), "image: has no pixels"),
        (Image.new("RGB", (0, 4)), "image: has no pixels"),
        (Image.new("La", (4, 4)), "of mode La"),
        ([[0]], "image: a list; give a file's path"),
        (None, "image: a NoneType"),
        (b"photo.jpg", "image: a bytes"),
        ("no_such.jpg", "no_such.jpg: no such file"),
    ],
)
def test_what_is_no_image_is_refused(net, image, named):
    assert named in refusal(net, image)


def test_wrong_arguments_are_refused(net, weights, tmp_path):
    assert "colours: 1 for 7 classes" in refusal(Segmenter.load, weights, colours=[(0, 0, 0)])
    assert "unknown key 'inference.flp'" in refusal(Segmenter.load, weights, flp=True)
    assert "was trained for 7 classes" in refusal(Segmenter.load, weights, classes=["a", "b"])
    assert "name a .pth or .safetensors" in refusal(net.save, tmp_path / "net.onx")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert "holds other files" in refusal(net.save, tmp_path / "mine")
    checkpoint.save(tmp_path / "bare.pth", {"model": net.net.state_dict()})
    assert "holds no config" in refusal(Segmenter.load, tmp_path / "bare.pth")
    words = ["dataset.root=x", "model.backbone=resnet18", "model.channels=null"]
    found = Segmenter.load(tmp_path / "bare.pth", words, config="demo.yaml")
    assert found.classes == net.classes


def test_a_network_is_not_saved_over_one_of_a_run(net, tmp_path):
    for file in ("run/config.yaml", "run/lists.json", "run/6_retrain/checkpoint.pth"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    line = refusal(net.save, tmp_path / "run" / "6_retrain" / "checkpoint.pth")
    assert "is of the run in" in line
    assert (tmp_path / "run" / "6_retrain" / "checkpoint.pth").read_bytes() == b""


@pytest.mark.parametrize("nets", [[], "net.pth", ["net.pth"]])
def test_what_is_no_ensemble_is_refused(nets):
    assert refusal(Segmenter.ensemble, nets).startswith("ensemble: give a list of networks")


def test_a_network_left_in_training_mode_is_told(weights, pixels):
    net = Segmenter.load(weights, classes=(f"class {n}" for n in range(7)))  # any iterable
    net.net.train()
    before = {key: value.clone() for key, value in net.net.state_dict().items()}
    assert refusal(net, pixels).startswith("net: is in training mode")
    assert same(net.net.state_dict(), before)


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (np.full((4, 4), 300), "class ids go from 0 to 254"),
        (np.full((4, 4), -1), "class ids go from 0 to 254"),
        (np.full((4, 4), 2.7), "mask: float64, (4, 4); give an array or tensor of whole numbers"),
        (torch.zeros(1, 4, 4, dtype=torch.uint8), "(1, 4, 4); give"),
        (np.zeros((4, 4), bool), "mask: bool"),
        (np.zeros((0, 4), int), "class ids go from"),
        (torch.zeros(4, 4, dtype=torch.uint8).to_sparse(), "mask: torch.uint8"),
        ([[0]], "mask: <class 'list'>"),
    ],
)
def test_what_is_no_mask_is_refused(net, pixels, mask, told):
    assert told in refusal(net.picture, mask)
    assert told in refusal(net.overlay, pixels, mask)


def test_ids_of_any_whole_numbers_make_one_picture(net):
    ids = np.array([[0, 1], [6, 255]])
    for kind in (np.uint8, np.int16, np.int64):
        assert np.array_equal(np.asarray(net.picture(ids.astype(kind))), ids)
        assert np.array_equal(np.asarray(net.picture(torch.from_numpy(ids.astype(kind)))), ids)


def test_a_mask_of_another_size_is_refused(net, pixels):
    height, width = pixels.shape[:2]
    line = refusal(net.overlay, pixels, np.zeros((width, height + 1), np.uint8))
    assert f"its image ({height}, {width}) (height, width); resize one" in line


@pytest.mark.parametrize(
    "colours", [[(1, 2)] * 7, [(1, 2, 3, 4)] * 7, [(0, 0, 256)] * 7, [(0.5, 0, 0)] * 7, "abcdefg"]
)
def test_colours_that_are_none_are_refused(weights, colours):
    line = refusal(Segmenter.load, weights, colours=colours)
    assert line == "colours: give (red, green, blue) from 0 to 255 for each class"


def test_colours_may_be_an_array(weights):
    colours = np.arange(21).reshape(7, 3)
    assert Segmenter.load(weights, colours=colours).palette[:21] == bytes(range(21))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"classes": "abcdefg"}, "classes: 'abcdefg' is not a list of names"),
        ({"classes": range(7)}, "is not a list of names"),
        ({"scales": {1.0}}, "scales: {1.0} is not a setting"),
        ({"scale": [1.0]}, "the nearest known key is 'inference.scales'"),
        ({"scales": np.array([1000.0])}, "inference.scales: 1000.0 is not allowed"),
    ],
)
def test_wrong_words_of_load_are_refused(weights, words, told):
    assert told in refusal(Segmenter.load, weights, **words)


@pytest.mark.parametrize("source", [None, b"net.pth", 3])
def test_what_is_no_path_is_refused(source):
    assert "source: a" in refusal(Segmenter.load, source)


def test_a_path_that_the_system_refuses_is_told():
    assert "cannot be looked for (File name too long)" in refusal(Segmenter.load, "x" * 300)


def test_settings_may_be_numpys(weights):
    net = Segmenter.load(weights, scales=np.array([0.5, 1.0]), long_side=np.int64(64))
    assert (net.config.inference.scales, net.config.inference.long_side) == ([0.5, 1.0], 64)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64])
def test_weights_of_another_kind_of_number_are_refused(weights, tmp_path, kind):
    content = torch.load(weights, weights_only=True)
    content["model"]["classifier.bias"] = content["model"]["classifier.bias"].to(kind)
    torch.save(content, tmp_path / "c.pth")
    line = refusal(Segmenter.load, tmp_path / "c.pth", ["dataset.root=x"])
    assert f"classifier.bias is of {kind}, and the network's of torch.float32" in line
