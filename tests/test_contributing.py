"""CONTRIBUTING.md's recipes, followed to the letter in a copy of the checkout."""

import re
import shutil

import pytest
from conftest import ROOT
from PIL import Image

_BLOCK = re.compile(r"```(?:python|yaml|text)\n(.*?)```", re.DOTALL)


def blocks():
    """Yield file, the line after which the text goes (None: a new file), and the text."""
    for text in _BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text("utf-8")):
        first, _, rest = text.partition("\n")
        file, _, after = first.removeprefix("# ").partition(", after: ")
        yield file, after or None, rest


@pytest.fixture(scope="session")
def copy(tmp_path_factory):
    """A copy of the project with everything that the recipes add."""
    root = tmp_path_factory.mktemp("contributed") / "project"
    left_out = shutil.ignore_patterns(
        ".git", ".venv*", "outdir", "/data", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, root, ignore=left_out)
    for file, after, text in blocks():
        path = root / file
        if after is None:
            assert not path.exists()
            path.write_text(text, "utf-8")
        else:
            before, found, rest = path.read_text("utf-8").partition(after)
            assert found, f"{file} has no '{after}'"
            line = "\n" if text.startswith(" ") or after.startswith("from ") else ""
            path.write_text(f"{before}{found}{line}{text.rstrip()}{rest}", "utf-8")
    return root


def test_every_recipe_has_a_file_that_is_there_or_new():
    found = list(blocks())
    assert len(found) == 9
    assert all((ROOT / file).exists() == (after is not None) for file, after, _ in found)


def test_a_new_data_set_is_checked(copy, tmp_path, run_program):
    data = tmp_path / "roads"
    for folder in ("JPEGImages", "SegmentationClass"):
        (data / folder).mkdir(parents=True)
    for number in range(6):
        Image.new("RGB", (60, 40), (40 * number, 0, 0)).save(data / f"JPEGImages/{number}.jpg")
        mask = Image.new("L", (60, 40))
        mask.paste(1 + number % 2, (0, 0, 30, 40))
        mask.save(data / f"SegmentationClass/{number}.png")
    for name, numbers in {"labeled": (0, 1), "unlabeled": (2, 3), "val": (4, 5)}.items():
        (data / f"{name}.txt").write_text("".join(f"{number}\n" for number in numbers))
    words = ["--config", "roads.yaml", f"dataset.root={data}"]
    done = run_program("-m", "dataset.splits", "check", *words, cwd=copy)
    assert done.returncode == 0, done.stderr
    for name in ("ground", "road", "car"):
        assert name in done.stdout


@pytest.mark.slow
def test_a_new_network_and_a_new_method_train(
    copy, demo_root, tmp_path, tiny_settings, run_program
):
    words = [*tiny_settings(demo_root, tmp_path), "model.name=plain", "name=new"]
    words += ["supervised.epochs=1", "retrain.epochs=1"]
    program = ["train.py", "--config", "demo.yaml", "--method", "mirrored"]
    done = run_program(*program, *words, cwd=copy)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "6_retrain" / "checkpoint.pth").is_file()
