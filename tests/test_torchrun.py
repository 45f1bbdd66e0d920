"""Stages and runs of several processes, over gloo, against those of one."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import train
from dataset.catalog import describe
from dataset.lists import read_splits, with_pseudo_masks
from dataset.loader import Chance, training_batches, whole_images
from dataset.query import QueryRule, build_query_index
from eval import evaluate
from model import network_of
from utils import checkpoint
from utils.config.reading import read_config
from utils.config.schema import InferenceSection
from utils.distributed import (
    world,
)
from utils.run.stages import Run


@pytest.fixture
def config(demo_overrides):
    def make(*words):
        return read_config("demo.yaml", [*demo_overrides, *words])

    return make


@pytest.mark.parametrize("count", [2, 3])
def test_every_image_is_read_by_one_process(together, config, count):
    samples = read_splits(config().dataset).unlabeled

    def work():
        settings, done = InferenceSection(batch_size=2), {samples[0].name, samples[1].name}
        loaders = [whole_images(samples, settings, 0, done=names) for names in ((), done)]
        steps = training_batches(keys_alone(), 4, range(2), Chance(0, "x"), 0)
        seen = [[batch.index.tolist() for batch in loader] for loader in loaders]
        return seen, [step.tolist() for step in steps]

    outcomes = together(count, work)
    for which, left_out in ((0, 0), (1, 2)):
        batches = sorted(batch for seen, _ in outcomes for batch in seen[which])
        expected = list(range(left_out, len(samples)))
        assert batches == [expected[i : i + 2] for i in range(0, len(expected), 2)]
    ((_, whole),) = together(1, work)
    for step in range(4):
        assert sorted(i for _, parts in outcomes for i in parts[step]) == sorted(whole[step])


def keys_alone():
    class Keys(torch.utils.data.Dataset):
        def __len__(self):
            return 9

        def __getitem__(self, key):
            return key.index

    return Keys()


@pytest.mark.slow
def test_files_of_labeling_and_selection_are_those_of_one_process(together, config, tmp_path):
    torch.manual_seed(0)
    teacher = tmp_path / "teacher"
    net = network_of(config().model, 7, pretrained=None)
    checkpoint.save(teacher / "checkpoint.pth", {"model": net.state_dict()})

    def infer():
        settings = config(f"name=of{world()}", "inference.batch_size=2", "query.exclude=[]")
        splits = read_splits(settings.dataset)
        rule = QueryRule.of(settings.query, describe(settings.dataset))
        index = build_query_index(splits.labeled, rule)
        with Run(settings) as run:
            inputs = (teacher,), splits.unlabeled, splits.labeled
            masks = run.stage("2_pseudo_label", train.write_pseudo_labels, *inputs)
            labeled = with_pseudo_masks(splits.unlabeled, masks / "masks")
            run.stage("3_select", train.select, teacher, splits, labeled, index)
            student = run.device.place(network_of(settings.model, 7, pretrained=None))
            checkpoint.load_weights(student, teacher / "checkpoint.pth")
            return run.folder, evaluate(student, settings, run.device)

    outcomes = [together(count, infer) for count in (1, 2, 3)]
    ((folder, score),) = outcomes[0]
    files = made(folder)
    assert len(files) == 10 + 1 + 5  # masks and their confidence; what stage 3 leaves
    for processes in outcomes[1:]:
        assert made(processes[0][0]) == files
        assert all(other == score for _, other in processes)
        assert not list(processes[0][0].rglob("unfinished"))


def made(run):
    files = [path for path in run.glob("[1-6]_*/**/*") if path.is_file()]
    return {str(f.relative_to(run)): f.read_bytes() for f in files if f.name != "stage.json"}


def torchrun(count, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*command, "--nproc-per-node", str(count), *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_an_image_that_one_process_cannot_read_ends_all_with_one_line(
    demo_copy, tmp_path, tiny_settings
):
    words = tiny_settings(demo_copy, tmp_path / "outdir")
    image = demo_copy / (demo_copy / "labeled.txt").read_text().split()[0]
    image.write_bytes(image.read_bytes()[:-200])
    with torchrun(2, "train.py", "--config", "demo.yaml", *words) as processes:
        _, said = processes.communicate(timeout=60)
    assert processes.returncode != 0
    lines = [line for line in said.splitlines() if line.startswith("error")]
    (line,) = [line for line in lines if not line.startswith("error: torchrun: another process")]
    assert str(image) in line
    assert said.count("Traceback") == 1  # torchrun's own


@pytest.mark.exhaustive
def test_a_run_of_two_processes_is_stopped_and_continues_to_its_end(
    demo_root, tmp_path, tiny_settings
):
    words = ["train.py", "--config", "demo.yaml", *tiny_settings(demo_root, tmp_path), "name=cut"]
    words += ["retrain.epochs=1", "supervised.epochs=5"]
    log = tmp_path / "cut" / "log.txt"
    with torchrun(2, *words) as processes:
        deadline = time.monotonic() + 60
        while not (log.is_file() and "epoch 1" in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        processes.send_signal(signal.SIGTERM)
        _, said = processes.communicate(timeout=60)
    assert said.count("stopped by SIGTERM; the same command") == 1
    state = checkpoint.load(tmp_path / "cut" / "1_supervised" / "unfinished" / "resume.pth")
    assert 1 <= state["epoch"] < 5
    with torchrun(2, *words) as processes:
        _, said = processes.communicate(timeout=300)
    assert processes.returncode == 0, said
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").open()]
    assert [line["epoch"] for line in lines] == [*range(1, 6), 1, 1]
