import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings
from PIL import Image
from torch import multiprocessing

from dataset.catalog import KINDS
from dataset.demo.writing import Scenes, write_demo
from dataset.lists import Splits, read_splits
from dataset.loader import RandomStreams
from dataset.query import Querier, QueryRule, build_query_index
from dataset.training import RetrainSamples
from utils.config.schema import AugmentSection, DatasetSection, InferenceSection, QuerySection
from utils.errors import UserError, exit_with_one_line

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # published lists and CamVid, where they are there
os.environ["HF_HUB_OFFLINE"] = "1"  # weights come from the installed package in every test

# The same examples every time: a failure here is the change's, not the day's.
settings.register_profile("project", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("project")


def same(one, other):
    """Whether two state dicts have equal tensors."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def reading(workers=0, **inference):
    """Return what ``whole_images`` asks of a config."""
    return SimpleNamespace(workers=workers, inference=InferenceSection(**inference))


def as_objective(loss, prepare=lambda batch: batch):
    """Return an objective that prepares and loses as it is told, and no more."""
    return SimpleNamespace(loss=loss, prepare=prepare)


def refusal(attempt, *arguments, **keys) -> str:
    """Call what must be refused; return the line that says why."""
    with pytest.raises(UserError) as refused:
        attempt(*arguments, **keys)
    return str(refused.value)


_FORK = multiprocessing.get_context("fork")  # spawned processes would import torch again


@pytest.fixture
def together(tmp_path):
    """Call a function in so many processes at once; return what each returned."""

    def process(number, count, store, work):
        torch.set_num_threads(1)  # no thread pool outlives a fork
        if count > 1:
            files = dist.FileStore(str(store), count)
            dist.init_process_group("gloo", store=files, rank=number, world_size=count)
        torch.save(work(), store.with_suffix(f".{number}"))

    def run(count, work):
        store = tmp_path / f"store{len(list(tmp_path.glob('store*')))}"
        processes = [
            _FORK.Process(target=process, args=(number, count, store, work))
            for number in range(count)
        ]
        for one in processes:
            one.start()
        for one in processes:
            one.join(60)
            assert one.exitcode == 0
        files = [store.with_suffix(f".{number}") for number in range(count)]
        return [torch.load(file, weights_only=False) for file in files]

    return run


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory) -> Path:
    """A small demo set: 6 labeled of 16, 4 for validation. Read it, don't spoil it."""
    root = tmp_path_factory.mktemp("demo")
    palette = KINDS["demo"].palette()
    write_demo(root, palette, Scenes(train=16, labeled=6, val=4, test=4, size=(48, 64)))
    return root


@pytest.fixture
def demo_copy(demo_root, tmp_path) -> Path:
    """A copy of the demo set that a test may spoil."""
    return Path(shutil.copytree(demo_root, tmp_path / "data"))


@pytest.fixture(scope="session")
def tiny_settings() -> Callable[[Path, Path], list[str]]:
    """Make settings that turn configs/demo.yaml into seconds of work; what is appended wins."""

    def settings_for(root: Path, outdir: Path) -> list[str]:
        return [
            f"dataset.root={root}",
            f"outdir={outdir}",
            "workers=0",
            "device=cpu",
            "precision=fp32",
            "augment.base_size=64",
            "augment.crop_size=48",
            "model.backbone=resnet18",
            "model.channels=null",
            "model.pretrained=null",
            "optimizer={lr: 0.02, head_multiple: 1}",
            "supervised.iterations=null",
            "supervised.epochs=2",
            "supervised.batch_size=4",
            "retrain.iterations=null",
            "retrain.epochs=2",
            "retrain.batch_size=4",
            "pseudo_label={scales: [1.0], threshold: 0}",
        ]

    return settings_for


@pytest.fixture
def demo_overrides(demo_root, tmp_path, tiny_settings) -> list[str]:
    return tiny_settings(demo_root, tmp_path / "outdir")


@pytest.fixture
def augment() -> AugmentSection:
    return AugmentSection(base_size=64, crop_size=48)


@pytest.fixture
def splits(demo_root) -> Splits:
    return read_splits(DatasetSection(kind="demo", root=str(demo_root)))


@pytest.fixture
def querier(splits, augment) -> Querier:
    rule = QueryRule.of(QuerySection(), KINDS["demo"])
    return Querier(splits.labeled, build_query_index(splits.labeled, rule), rule, augment)


@pytest.fixture
def retrain(splits, querier, augment) -> RetrainSamples:
    """A retraining set in which the true masks of val stand for pseudo labels."""
    chance = RandomStreams(0, "4_retrain")
    return RetrainSamples(splits.val, splits.labeled, augment, chance, querier=querier)


@pytest.fixture
def complaint(monkeypatch, capsys):
    """Type a command; return the one line that the program answers with exit code 2.

    Only keys that do not fit follow it, as an indented table.
    """

    def typed(program, *words) -> str:
        monkeypatch.setattr(sys, "argv", [program.__file__, *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            exit_with_one_line(program.main)
        assert ended.value.code == 2
        line, *rows = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert all(row.startswith("  ") and "weights of another" in line for row in rows)
        return line

    return typed


class _Folder(SimpleHTTPRequestHandler):
    timeout = 5

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A folder, and the address at which a server on this machine offers it."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(_Folder, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield SimpleNamespace(folder=folder, url=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join(5)


@pytest.fixture
def read_back():
    """Read a prepared data set as training does: an image labeled, the rest of train unlabeled.

    Every mask of it must have the palette of its kind.
    """

    def read(kind: str, root: Path) -> Splits:
        first, *rest = (root / "train.txt").read_text().splitlines(keepends=True)
        for line in (first, *rest, *(root / "val.txt").open()):
            with Image.open(root / line.split()[1]) as mask:
                assert (mask.mode, bytes(mask.getpalette())) == ("P", KINDS[kind].palette())
        (root / "labeled.txt").write_text(first)
        (root / "unlabeled.txt").write_text("".join(rest))
        lists = {split: str(root / f"{split}.txt") for split in ("labeled", "unlabeled", "val")}
        return read_splits(DatasetSection(kind=kind, root=str(root), **lists))

    return read


@pytest.fixture
def answer(monkeypatch, capsys):
    """Type a command that ends well; return what the program printed, in lines."""

    def typed(program, *words) -> list[str]:
        monkeypatch.setattr(sys, "argv", [program.__file__, *map(str, words)])
        program.main()
        return capsys.readouterr().out.splitlines()

    return typed


@pytest.fixture(scope="session")
def run_program() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program of the project as a user types it, in the project's folder or another."""

    def run(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)

    return run


@pytest.fixture(scope="session")
def finished(demo_root, tmp_path_factory, tiny_settings, run_program) -> tuple[Path, str]:
    """A six-stage run by the command line: its folder and what it printed. Don't spoil it."""
    outdir = tmp_path_factory.mktemp("outdir")
    words = tiny_settings(demo_root, outdir)
    done = run_program("train.py", "--config", "demo.yaml", *words, "name=whole")
    assert done.returncode == 0, done.stderr
    return outdir / "whole", done.stdout


def believe_votes(run: Path) -> None:
    """Let the votes of a run count fully, which are silent after a training of seconds."""
    file = run / "2_votes" / "votes.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "teacher": 1.0, "votes": 1.0}))
