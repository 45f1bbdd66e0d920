"""Several processes, over gloo, against one: what they share, steps, stages, and runs."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, as_objective, reading, refusal, same
from networks import FAMILIES, family
from torch import nn

import train
from dataset.catalog import dataset_info
from dataset.lists import read_splits, with_pseudo_masks
from dataset.loader import RandomStreams, training_batches, whole_images
from dataset.query import QueryRule, build_query_index
from dataset.training import LabeledPair
from eval import evaluate
from model import Segmenter, fitting, network_of
from model.cisc.pseudo_labels import FoldTeacher, discount_votes, fit_votes
from model.cisc.students import StudentBatch
from model.fitting import TrainingStep
from model.losses import cross_entropy
from train import retrain_loss, supervised_loss
from utils import checkpoint
from utils import distributed as dist
from utils.config.reading import read_config
from utils.config.schema import OptimizerSection
from utils.device import Device
from utils.errors import Stopped
from utils.evaluation import ConfusionMatrix
from utils.files import write_json
from utils.optimization import Optimization
from utils.run.signals import defer_signals, stop_here
from utils.run.stages import Run


@pytest.mark.parametrize("count", [1, 3])
def test_parts_lose_and_double_nothing_and_come_back_in_order(together, count):
    def work():
        return [
            (dist.shard(range(n)), dist.gather_list([i * i for i in dist.shard(range(n))]))
            for n in range(8)
        ]

    outcomes = together(count, work)
    for n in range(8):
        parts = [list(outcome[n][0]) for outcome in outcomes]
        assert sorted(i for part in parts for i in part) == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert all(outcome[n][1] == [i * i for i in range(n)] for outcome in outcomes)


def test_two_processes_decide_reduce_and_write_as_one(together, tmp_path):
    def work():
        dist.on_rank_zero((tmp_path / "who").write_text)(str(dist.rank()))
        matrix = ConfusionMatrix(2)
        matrix.update(torch.tensor([dist.rank()]), torch.tensor([1]))
        return {
            "reduced": dist.all_reduce_sum(torch.tensor(float(dist.rank() + 2))).item(),
            "largest": dist.largest(7 * dist.rank()),
            "broadcast": dist.broadcast(os.getpid),
            "merged": dist.gather_dict(
                [{number: dist.rank()} for number in dist.shard([10, 11, 12])]
            ),
            "counts": matrix.reduce().counts.tolist(),
            "place": (dist.rank(), dist.world(), dist.is_first()),
        }

    one, two = together(2, work)
    assert (tmp_path / "who").read_text() == "0"
    assert (one.pop("place"), two.pop("place")) == ((0, 2, True), (1, 2, False))
    assert one == two
    assert one["reduced"] == 2 + 3
    assert one["largest"] == 7
    assert list(one["merged"].items()) == [(10, 0), (11, 1), (12, 0)]
    assert one["counts"] == [[0, 0], [1, 1]]


def batch_of(chosen):
    """Part of a batch of four samples; valid pixels are not spread evenly."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 4, 3, 17, 17, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (3, 4, 17, 17), generator=generator)
    labels[:, 0, :11] = 255
    labels[0, 2] = 255
    shared_class = torch.tensor([1, 255, 2, 3])
    return images[:, chosen], labels[:, chosen], shared_class[chosen]


def pairs(chosen):
    images, labels, shared_class = batch_of(chosen)
    batch = LabeledPair(images[0], labels[0], images[1], labels[1], shared_class)
    return partial(supervised_loss, labeled_loss=cross_entropy, consistency=1.0), batch


def samples(chosen):
    images, labels, _ = batch_of(chosen)
    weight = images[0].abs().mean(dim=1).clamp_max(1)
    known = images[[2, 3]].transpose(0, 1), labels[[1, 2]].transpose(0, 1)
    unknown = images[[1, 0]].transpose(0, 1), labels[[0, 0]].transpose(0, 1)
    batch = StudentBatch(*known, *unknown, weight.unsqueeze(1).expand(-1, 2, -1, -1))
    return partial(retrain_loss, labeled_loss=cross_entropy), batch


@pytest.mark.parametrize(
    ("name", "kind", "count", "accumulate"),
    [
        ("ResNet", samples, 3, 1),
        *((name, pairs, 2, 2) for name in FAMILIES if name != "Xception"),
        pytest.param("Xception", pairs, 2, 2, marks=pytest.mark.exhaustive),  # a minute
    ],
)
def test_a_step_of_several_processes_is_that_of_one(together, name, kind, count, accumulate):
    def step():
        net = family(name).double().train()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d | nn.Dropout | nn.Dropout2d):
                module.eval()  # parts of a batch have statistics and noise of their own
        loss, batch = kind(dist.shard([0, 1, 2, 3]))
        student = dist.parallel(net)  # gradients are averaged for as long as it lives
        device = Device("cpu", "fp32")
        optimization = Optimization(net, OptimizerSection(lr=0.01), 9, device.scaler())
        count = accumulate if dist.world() > 1 else 1
        step = TrainingStep(student, as_objective(loss), optimization, device, count)
        terms, not_finite = step(batch, 0)
        assert not_finite is None
        values = {name: dist.all_reduce_sum(value) for name, value in terms.items()}
        return {**values, **{name: weight.detach() for name, weight in net.named_parameters()}}

    (expected,) = together(1, step)
    for found in together(count, step):
        # Cross entropy is in float32 in every precision.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_finite_for_one_process_alone_stops_all(together):
    def work():
        torch.manual_seed(0)
        net = nn.Sequential(OrderedDict(backbone=nn.Linear(1, 1), head=nn.Linear(1, 1)))
        before = [weight.clone() for weight in net.parameters()]
        whole = dist.parallel(net)
        sgd = Optimization(net, OptimizerSection(), 9, Device("cpu", "fp32").scaler())
        sgd.backward(whole(torch.full((1, 1), torch.inf if dist.is_first() else 1.0)).sum())
        return sgd.step() is None, all(map(torch.equal, before, net.parameters()))

    assert together(2, work) == [(False, True)] * 2


def test_a_signal_to_one_process_stops_all_at_the_same_place(together):
    def work():
        with defer_signals():
            stop_here()
            if dist.rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            try:
                stop_here()
            except Stopped as stopped:
                return stopped.number
        return None

    assert together(2, work) == [signal.SIGTERM] * 2


@pytest.fixture
def config(demo_overrides):
    def make(*words):
        return read_config("demo.yaml", [*demo_overrides, *words])

    return make


@pytest.mark.parametrize("count", [2, 3])
def test_every_image_is_read_by_one_process(together, config, count):
    samples = read_splits(config().dataset).unlabeled

    def work():
        settings, done = reading(batch_size=2), {samples[0].name, samples[1].name}
        loaders = [whole_images(settings, samples, done=names) for names in ((), done)]
        steps = training_batches(Keys(), 4, range(2), RandomStreams(0, "x"), 0)
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


class Keys(torch.utils.data.Dataset):
    def __len__(self):
        return 9

    def __getitem__(self, key):
        return key.index


@pytest.mark.exhaustive
def test_files_of_labeling_and_selection_are_those_of_one_process(together, config, tmp_path):
    torch.manual_seed(0)
    teacher = tmp_path / "teacher"
    net = network_of(config().model, 7, pretrained=None)
    checkpoint.save(teacher / "checkpoint.pth", {"model": net.state_dict()})
    votes = tmp_path / "2_votes"
    write_json(votes / "votes.json", {"factor": 4.0, "teacher": 1.0, "votes": 1.0})

    def infer():
        settings = config(f"name=of{dist.world()}", "inference.batch_size=2", "query.exclude=[]")
        splits = read_splits(settings.dataset)
        rule = QueryRule.of(settings.query, dataset_info(settings.dataset))
        index = build_query_index(splits.labeled, rule)
        with Run(settings) as run:
            labeling = train.Labeling(teacher, votes, stores_votes=True)
            inputs = labeling, splits, splits.unlabeled
            masks = run.stage("2_pseudo_label", train.write_pseudo_labels, *inputs)
            labeled = with_pseudo_masks(splits.unlabeled, masks / "masks")
            run.stage("3_select", train.select, teacher, splits, labeled, index)
            student = run.device.place(network_of(settings.model, 7, pretrained=None))
            checkpoint.load_weights(student, teacher / "checkpoint.pth")
            return run.folder, evaluate(Segmenter(student, settings))

    outcomes = [together(count, infer) for count in (1, 2, 3)]
    ((folder, score),) = outcomes[0]
    files = made(folder)
    # Masks and votes, and three files about them; what stage 3 leaves.
    assert len(files) == 10 + 10 + 3 + 5
    for processes in outcomes[1:]:
        assert made(processes[0][0]) == files
        assert all(other == score for _, other in processes)
        assert not list(processes[0][0].rglob("unfinished"))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4])
def test_votes_fitted_by_several_processes_are_those_of_one(together, config, tmp_path, size):
    """Folds of three images are three batches or one, which not every process has."""
    model = "model={backbone: timm/tf_efficientnet_lite0, output_stride: 32, pretrained: auto}"
    settings = config(model, f"inference.batch_size={size}", "pseudo_label.neighbour_scales=[6]")
    (labeled, unlabeled, *_), teacher = read_splits(settings.dataset), tmp_path / "teacher"
    torch.manual_seed(0)
    weights = network_of(settings.model, 7, pretrained=None).state_dict()
    checkpoint.save(teacher / "checkpoint.pth", {"model": weights, "class_pixels": [1] * 7})
    teachers = [FoldTeacher(teacher, labeled[:3]), FoldTeacher(teacher, labeled[3:])]
    later, believed = tmp_path / "later", tmp_path / "believed"
    weights |= {"classifier.weight": 3 * weights["classifier.weight"]}
    checkpoint.save(later / "checkpoint.pth", {"model": weights, "class_pixels": [1] * 7})
    write_json(believed / "votes.json", {"factor": 6.0, "teacher": 1.0, "votes": 1.0})

    def fit():
        with Run(settings.model_copy(update={"name": f"of{dist.world()}"})) as run:
            folder = run.stage("2_votes", fit_votes, labeled, teachers)
            inputs = labeled, unlabeled, believed, (teacher, later)
            left = run.stage("5_votes", discount_votes, *inputs)
            return [(one / "votes.json").read_text() for one in (folder, left)]

    (expected,) = together(1, fit)
    assert "fit" in json.loads(expected[0])
    assert 0 <= json.loads(expected[1])["votes"] < 1
    assert together(2, fit) == [expected] * 2


@pytest.mark.slow
def test_two_processes_report_the_score_of_the_checkpoint_that_they_keep(together, config):
    """On CPUs each process has batch norm statistics of its own, of its parts of the batches."""
    settings = config("name=two", "stages=[1]", "inference.batch_size=1")  # both validate
    together(2, lambda: train.train(settings))
    run = Path(settings.outdir) / "two"
    results = json.loads((run / "results.json").read_text())
    kept = run / "1_supervised" / "checkpoint.pth"
    (score,) = together(1, lambda: evaluate(Segmenter.load(kept)))
    assert score["per_class_iou"] == results["per_class_iou"]
    assert score["miou"] == results["miou"]


@pytest.mark.slow
def test_two_processes_stop_early_together(together, config, monkeypatch):
    validate, seen = fitting._validate, []

    def fallen(*arguments):
        """Validate; from the second time on everything is wrong."""
        matrix, before = validate(*arguments), len(seen)
        seen.append(matrix)
        matrix.counts = matrix.counts.roll(1 if before else 0, dims=1)
        matrix.counts[0, 0] += 0 if before else 10**6
        return matrix

    monkeypatch.setattr(fitting, "_validate", fallen)
    monkeypatch.setattr(train, "_keep_predictions", lambda *_: None)
    words = ["name=two", "stages=[1]", "supervised.epochs=5", "evaluate={every: 1, patience: 2}"]
    settings = config(*words)
    together(2, lambda: train.train(settings))
    run = Path(settings.outdir) / "two"
    report = json.loads((run / "results.json").read_text())["stages"]["1_supervised"]
    assert report["iterations"] * 5 == report["planned_iterations"] * 3
    log = (run / "log.txt").read_text()
    assert log.count("stopped after epoch 3 of 5") == 1


def test_buffers_of_rank_0_are_broadcast(together):
    def work():
        nets = [nn.BatchNorm1d(2), nn.BatchNorm1d(2)]
        for net in nets:
            net(torch.full((3, 2), dist.rank() + 1.0))  # counts batches, too
        if dist.rank() == 1:
            nets[1](torch.ones(3, 2))
        dist.broadcast_buffers(*nets)
        return [net.state_dict() for net in nets]

    one, two = together(2, work)
    assert all(map(same, one, two))
    assert all(state["running_mean"].tolist() == pytest.approx([0.1, 0.1]) for state in two)


def made(run):
    files = [path for path in run.glob("[1-6]_*/**/*") if path.is_file()]
    return {str(f.relative_to(run)): f.read_bytes() for f in files if _counts(f)}


def _counts(file):
    return file.name != "stage.json" and "panels" not in file.parts


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


def test_processes_whose_torchrun_was_killed_at_once_end(monkeypatch):
    """Else they would try to connect to it for twelve hours."""
    with socket.socket() as taken:  # bound, and never listening
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        settings = {"RUN_ID": "x", "USE_AGENT_STORE": "True"}
        for key, value in settings.items():
            monkeypatch.setenv(f"TORCHELASTIC_{key}", value)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setattr(sys, "platform", "none")  # whose processes ask for no signal
        line = refusal(dist.process_group().__enter__)
    assert line.startswith(f"torchrun: has ended, or cannot be reached at 127.0.0.1:{port} (")


@pytest.mark.exhaustive
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


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.exhaustive
def test_a_run_of_two_processes_is_stopped_and_continues_to_its_end(
    demo_root, tmp_path, tiny_settings
):
    words = ["train.py", "--config", "demo.yaml", *tiny_settings(demo_root, tmp_path), "name=cut"]
    words += ["retrain.epochs=1", "supervised.epochs=5"]
    log = tmp_path / "cut" / "log.txt"
    with torchrun(2, *words) as processes:
        wait_until(lambda: log.is_file() and "epoch 1" in log.read_text())
        processes.send_signal(signal.SIGTERM)
        _, said = processes.communicate(timeout=60)
    assert said.count("stopped by SIGTERM; the same command") == 1
    state = checkpoint.load(tmp_path / "cut" / "1_supervised" / "unfinished" / "resume.pth")
    assert 1 <= state["epoch"] < 5
    with torchrun(2, *words) as processes:  # its processes end with it
        wait_until(lambda: log.read_text().count("on cpu") == 2)
        children = Path(f"/proc/{processes.pid}/task/{processes.pid}/children").read_text().split()
        processes.kill()
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children), seconds=10)
    assert not (tmp_path / "cut" / "results.json").exists()
    with torchrun(2, *words) as processes:
        _, said = processes.communicate(timeout=300)
    assert processes.returncode == 0, said
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").open()]
    folds = [*range(1, 5)] * 2  # a quarter of 15 iterations, one an epoch
    assert [line["epoch"] for line in lines] == [*range(1, 6), *folds, 1, 1]
