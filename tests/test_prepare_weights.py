import hashlib
from types import SimpleNamespace

import pytest
from conftest import ROOT

from dataset.prepare import __main__ as program
from dataset.prepare import weights as prepare

HASHES = {
    "resnet18": "f37072fd",
    "resnet34": "b627a593",
    "resnet50": "0676ba61",
    "resnet101": "63fe2227",
    "resnet152": "394f9c45",
}


def test_table_of_the_readme_agrees():
    readme = (ROOT / "pretrained/README.md").read_text(encoding="utf-8")
    for name, prefix in HASHES.items():
        assert f"| `{name}.pth` | `{name}-{prefix}.pth` |" in readme
    assert all(f"| `{name}.pth` |" in readme for name in prepare.BY_HAND)


@pytest.fixture
def calls(monkeypatch):
    """What ``download`` is called with, instead of downloading."""
    found = []
    monkeypatch.setattr(prepare, "download", lambda *call: found.append(call))
    return found


def test_writes_each_name_from_the_mirror(mirror, tmp_path, monkeypatch, answer):
    prefixes = {}
    for name in ("resnet18", "resnet50"):
        prefixes[name] = hashlib.sha256(name.encode()).hexdigest()[:8]
        (mirror.folder / f"{name}-{prefixes[name]}.pth").write_bytes(name.encode())

    def weights_of(name):
        url = f"https://unreachable.invalid/models/{name}-{prefixes[name]}.pth"
        return SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url=url))

    monkeypatch.setattr(prepare, "get_model_weights", weights_of)
    to = tmp_path / "weights"
    words = ["weights", "resnet18", "resnet50", "--to", to, "--mirror", f"{mirror.url}/"]
    assert answer(program, *words) == [
        f"{to / name}.pth: ready, its sha256 begins with {prefix}"
        for name, prefix in prefixes.items()
    ]
    made = {file.name: file.read_bytes() for file in to.iterdir()}
    assert made == {"resnet18.pth": b"resnet18", "resnet50.pth": b"resnet50"}


@pytest.mark.parametrize("name", prepare.WEIGHTS)
def test_goes_from_torchvision_to_the_projects_folder(calls, answer, name):
    answer(program, "weights", name)
    url = f"https://download.pytorch.org/models/{name}-{HASHES[name]}.pth"
    assert calls == [(url, ROOT / f"pretrained/{name}.pth", HASHES[name])]


def test_missing_on_the_mirror(mirror, complaint, tmp_path):
    line = complaint(program, "weights", "resnet34", "--to", tmp_path, "--mirror", mirror.url)
    assert f"{mirror.url}/resnet34-b627a593.pth: cannot be fetched (HTTP Error 404" in line
    assert line.endswith(f"save it as {tmp_path / 'resnet34.pth'}")


def test_xception_is_fetched_by_hand(complaint, tmp_path):
    line = complaint(program, "weights", "xception65", "--to", tmp_path)
    assert line.startswith("error: xception65: there is no public address with a checksum; ")
    assert line.endswith(f"save it as {tmp_path / 'xception65.pth'}")


def test_unknown_name_is_refused_before_anything_is_fetched(complaint, calls):
    line = complaint(program, "weights", "resnet18", "resnet1O1")
    assert line == (
        "error: resnet1O1: no such weights; known are resnet18, resnet34, resnet50, resnet101, "
        "resnet152, xception65, resnet50_deep, resnet101_deep"
    )
    assert calls == []
