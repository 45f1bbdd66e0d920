"""README and docs name commands, options, keys, files and links that exist."""

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from utils.config.reading import _RENAMED_KEYS, _keys
from utils.config.schema import Config

DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "pretrained" / "README.md",
    *sorted((ROOT / "configs").rglob("*.yaml")),
]
KEYS = {*_keys(Config)}
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
EARLIER = "# Earlier tables"  # of docs/results.md and docs/rectifier.md: their commands are old


def words_of(path: Path) -> str:
    text = path.read_text("utf-8")
    return text.partition(EARLIER)[0].replace("\\\n", " ")


def commands(text: str):
    """Yield program files and the words after them, a command at a time."""
    pattern = r"python(?:3)? (?:-m ([\w.]+)|((?:\w+/)*\w+\.py))([^\n`|#]*)"
    for module, script, rest in re.findall(pattern, text):
        yield source(module) if module else ROOT / script, rest.split()


def source(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    if (path / "__main__.py").is_file():
        return path / "__main__.py"
    return path.with_suffix(".py") if path.parent.is_dir() and path.parent != ROOT else None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_options_exist(path):
    for program, words in commands(words_of(path)):
        if program is None:
            continue  # not ours: pip, venv, pytest, torch.distributed.run
        assert program.is_file(), f"{path.name} names {program.name}"
        whole = program.name == "__main__.py" or program.parent.name == "benchmarks"
        files = program.parent.rglob("*.py") if whole else [program]
        text = "".join(file.read_text("utf-8") for file in files)
        for word in words:
            if re.fullmatch(r"--[a-z][\w-]*", word):
                option = word.replace("--no-", "--", 1)  # of BooleanOptionalAction
                known = f'"{word}"' in text or f'"{option}"' in text
                assert known, f"{path.name}: {program.name} has no {word}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_keys_exist(path):
    """Dotted names that begin with a section, in code or on a command line."""
    text = "".join(
        re.findall(r"`[^`]*`|```.*?```|^#.*?$", words_of(path), re.DOTALL | re.MULTILINE)
    )
    for name in re.findall(r"(?<![\w./-])([a-z_]+(?:\.[a-z_]+)+)(?![\w./(])", text):
        if name.partition(".")[0] not in SECTIONS or name.rpartition(".")[2] in ("py", "md", "txt"):
            continue
        parent = name.rpartition(".")[0]
        known = name in KEYS or name in _RENAMED_KEYS or parent == "dataset.class_map"
        assert known or is_module(name), f"{path.name}: no key '{name}'"


def is_module(name: str) -> bool:
    return source(name) is not None or ROOT.joinpath(*name.split(".")).is_dir()


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.suffix == ".md"], ids=lambda p: p.name)
def test_links_resolve(path):
    text = path.read_text("utf-8")
    for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{path.name}: no {link}"
        if anchor and target.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, f"{path.name}: no section {link}"


def test_the_workflow_runs_the_readmes_test_command():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    (job,) = workflow["jobs"].values()
    runs = [step["run"] for step in job["steps"] if "run" in step]
    assert runs == ["make lint test"]
    assert "make test" in (ROOT / "README.md").read_text("utf-8")
