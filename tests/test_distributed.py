"""Several processes on this machine, over gloo, against one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch import multiprocessing, nn

import train
from dataset.catalog import describe
from dataset.loader import Chance, batch_seeds, training_batches
from dataset.query import QueryRule, build_query_index
from dataset.splits import read_splits
from dataset.whole_images import whole_images
from eval import build_network, validate
from model import build_model
from model.dropout import seed_dropout
from model.losses import cross_entropy, ohem_cross_entropy
from model.objectives import retrain_loss, supervised_loss
from utils import checkpoint
from utils.batch_norm import synchronised
from utils.config import InferenceSection, OptimizerSection
from utils.distributed import (
    by_first,
    gathered,
    is_first,
    largest,
    merged,
    mine,
    parallel,
    rank,
    shared,
    total,
    world,
)
from utils.metrics import ConfusionMatrix
from utils.optimization import Optimization
from utils.precision import Device
from utils.read_config import read_config
from utils.records import QueriedImage, QueryPair, RetrainSample
from utils.run import Run


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
        fork = multiprocessing.get_context("fork")
        processes = [
            fork.Process(target=process, args=(number, count, store, work))
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


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_lose_and_double_nothing_and_come_back_in_order(together, count):
    def work():
        return [(mine(range(n)), gathered([i * i for i in mine(range(n))])) for n in range(8)]

    outcomes = together(count, work)
    for n in range(8):
        parts = [list(outcome[n][0]) for outcome in outcomes]
        assert sorted(i for part in parts for i in part) == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert all(outcome[n][1] == [i * i for i in range(n)] for outcome in outcomes)


def test_two_processes_decide_add_and_write_as_one(together, tmp_path):
    def work():
        weight = torch.tensor(float(rank() + 2), requires_grad=True)
        added = total(weight.square())
        added.backward(torch.tensor(rank() + 1.0))
        by_first((tmp_path / "who").write_text)(str(rank()))
        matrix = ConfusionMatrix(2)
        matrix.update(torch.tensor([rank()]), torch.tensor([1]))
        return {
            "total": added.item(),
            "gradient": weight.grad.item(),
            "largest": largest(7 * rank()),
            "shared": shared(os.getpid),
            "merged": merged([{number: rank()} for number in mine([10, 11, 12])]),
            "counts": matrix.reduce().counts.tolist(),
            "place": (rank(), world(), is_first()),
        }

    one, two = together(2, work)
    assert (tmp_path / "who").read_text() == "0"
    assert (one.pop("place"), two.pop("place")) == ((0, 2, True), (1, 2, False))
    assert (one.pop("gradient"), two.pop("gradient")) == (2 * 2 * 3, 2 * 3 * 3)
    assert one == two
    assert one["total"] == 2 * 2 + 3 * 3
    assert one["largest"] == 7
    assert list(one["merged"].items()) == [(10, 0), (11, 1), (12, 0)]
    assert one["counts"] == [[0, 0], [1, 1]]


@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0, 1, 3], [2]]])
def test_batch_norm_of_parts_is_batch_norm_of_the_whole(together, parts):
    torch.manual_seed(0)
    maps = torch.randn(4, 3, 5, 4, dtype=torch.float64) * 3 + 100
    slopes = torch.randn_like(maps)

    def normalised(own):
        torch.manual_seed(1)
        norm = nn.BatchNorm2d(3, dtype=torch.float64)
        nn.init.normal_(norm.weight)
        norm = synchronised(norm)
        inputs = maps[own].requires_grad_()
        out = norm(inputs)
        (out * slopes[own]).sum().backward()
        gradients = [total(norm.weight.grad), total(norm.bias.grad)]
        evaluated = norm.eval()(maps[own])
        return out.detach(), inputs.grad, evaluated, gradients, norm.state_dict()

    outcomes = together(2, lambda: normalised(parts[rank()]))
    expected = normalised([0, 1, 2, 3])
    assert expected[4]["running_mean"].abs().min() > 1
    for own, outcome in zip(parts, outcomes, strict=True):
        for found, whole in zip(outcome[:3], expected[:3], strict=True):
            torch.testing.assert_close(found, whole[own])
        torch.testing.assert_close(outcome[3:], expected[3:])


def batch_of(parts):
    """Part of a batch of four samples; valid pixels are not spread evenly."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 4, 3, 33, 33, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 5, (3, 4, 33, 33), generator=generator)
    labels[:, 0, :20] = 255
    labels[0, 2] = 255
    shared_class = torch.tensor([1, 255, 2, 3])
    return images[:, parts], labels[:, parts], shared_class[parts]


def supervised(net, parts):
    images, labels, shared_class = batch_of(parts)
    pair = QueryPair(images[0], labels[0], images[1], labels[1], shared_class)
    return supervised_loss(net, cross_entropy, 1.0, pair)


def retrained(net, parts, min_kept):
    images, labels, shared_class = batch_of(parts)
    queried = QueriedImage(shared_class, images[3], labels[2])
    batch = RetrainSample(images[0], labels[0], images[1], images[2], labels[1], queried)
    hard = partial(ohem_cross_entropy, threshold=0.3, min_kept=min_kept)
    weigh = lambda batch: batch.image.abs().mean(dim=1).clamp_max(1)  # noqa: E731
    return retrain_loss(net, weigh, hard, batch)


@pytest.mark.parametrize(
    "objective",
    [supervised, partial(retrained, min_kept=2500), partial(retrained, min_kept=10**6)],
    ids=["supervised", "hard pixels", "all pixels"],
)
def test_losses_gradients_and_statistics_of_parts_add_up_to_the_wholes(together, objective):
    def step():
        torch.manual_seed(0)
        net = build_model("deeplabv3plus", "resnet18", 5, output_stride=16).double()
        net, parts = synchronised(net), mine([0, 1, 2, 3])
        seed_dropout(net, [100 + index for index in parts])
        student = parallel(net)  # gradients are averaged for as long as it lives
        loss = objective(student, parts)
        (loss.total * world()).backward()
        values = {name: total(value.detach()) for name, value in loss.shown.items()}
        gradients = {f"{name}'": weight.grad for name, weight in net.named_parameters()}
        return {**values, **gradients, **dict(net.named_buffers())}

    (expected,) = together(1, step)
    for count in (2, 3):
        for found in together(count, step):
            # Cross entropy is in float32 whatever comes.
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_finite_for_one_process_alone_changes_nothing(together):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = nn.Linear(1, 1), nn.Linear(1, 1)

        def forward(self, values):
            return self.head(self.backbone(values)).sum()

    def work():
        torch.manual_seed(0)
        net = Net()
        before = [weight.clone() for weight in net.parameters()]
        whole = parallel(net)
        sgd = Optimization(net, OptimizerSection(), 9, Device("cpu", "fp32").scaler())
        sgd.add(whole(torch.full((1, 1), torch.inf if is_first() else 1.0)))
        stepped, same = sgd.step(), all(map(torch.equal, before, net.parameters()))
        sgd.add(whole(torch.ones(1, 1)))
        return stepped, same, sgd.step()

    assert together(2, work) == [(False, True, True)] * 2


@pytest.fixture
def config(demo_overrides):
    def make(*words):
        return read_config("demo.yaml", [*demo_overrides, "optimizer.lr=0.001", *words])

    return make


@pytest.mark.parametrize("count", [2, 3])
def test_every_image_is_read_by_one_process(together, config, count):
    samples = read_splits(config().dataset).unlabeled

    def work():
        settings, done = InferenceSection(batch_size=2), {samples[0].name, samples[1].name}
        loaders = [whole_images(samples, settings, 0), whole_images(samples, settings, 0, done)]
        steps = training_batches(keys_alone(), 4, range(2), Chance(0, "x"), 0)
        seeds = batch_seeds(9, 4, range(2), Chance(0, "x"))
        seen = [[batch.index.tolist() for batch in loader] for loader in loaders]
        return seen, *([step.tolist() for step in given] for given in (steps, seeds))

    outcomes = together(count, work)
    for which, left_out in ((0, 0), (1, 2)):
        batches = sorted(batch for seen, *_ in outcomes for batch in seen[which])
        expected = list(range(left_out, len(samples)))
        assert batches == [expected[i : i + 2] for i in range(0, len(expected), 2)]
    ((_, whole, seeds),) = together(1, work)
    for step in range(4):
        assert sorted(i for _, parts, _ in outcomes for i in parts[step]) == sorted(whole[step])
        assert sorted(i for *_, s in outcomes for i in s[step]) == sorted(seeds[step])


def keys_alone():
    class Keys(torch.utils.data.Dataset):
        def __len__(self):
            return 9

        def __getitem__(self, key):
            return key.index

    return Keys()


@pytest.mark.slow
def test_a_stage_of_two_processes_goes_as_one_would(together, config):
    """In fp32: the same loss curve and weights to 1e-4."""

    def stage_1(name):
        settings = config(f"name={name}")
        splits = read_splits(settings.dataset)
        rule = QueryRule.of(settings.query, describe(settings.dataset))
        with Run(settings) as run:
            index = build_query_index(splits.labeled, rule)
            run.stage("1_supervised", train.train_supervised, splits, index)
            return run.folder

    ((one,), (two, _)) = together(1, lambda: stage_1("one")), together(2, lambda: stage_1("two"))
    lines = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, two)
    ]
    assert len(lines[0]) == len(lines[1]) == 2
    for before, after in zip(*lines, strict=True):
        before.pop("images_per_second"), after.pop("images_per_second")
        assert after == pytest.approx(before, abs=1e-4)
    weights = [
        checkpoint.load(run / "1_supervised" / "checkpoint.pth")["model"] for run in (one, two)
    ]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_files_of_labeling_and_selection_are_those_of_one_process(together, config, tmp_path):
    torch.manual_seed(0)
    teacher = tmp_path / "teacher"
    net = build_network(config(), pretrained=None)
    checkpoint.save(teacher / "checkpoint.pth", {"model": net.state_dict()})

    def infer():
        settings = config(f"name=of{world()}", "inference.batch_size=2", "query.exclude=[]")
        splits = read_splits(settings.dataset)
        rule = QueryRule.of(settings.query, describe(settings.dataset))
        index = build_query_index(splits.labeled, rule)
        with Run(settings) as run:
            masks = run.stage(
                "2_pseudo_label", train.write_pseudo_labels, teacher, splits.unlabeled
            )
            run.stage("3_select", train.select, teacher, splits, masks, index)
            student = run.device.place(build_network(settings, pretrained=None))
            checkpoint.load_weights(student, teacher / "checkpoint.pth")
            counts = validate(student, splits.val, settings, run.device).counts
            return run.folder, counts, run.stages

    outcomes = [together(count, infer) for count in (1, 2, 3)]
    ((folder, counts, _),) = outcomes[0]
    files = made(folder)
    assert len(files) == 10 + 1 + 5  # masks and their confidence; what stage 3 leaves
    for processes in outcomes[1:]:
        assert made(processes[0][0]) == files
        assert all(torch.equal(other, counts) for _, other, _ in processes)
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


def own_lines(printed):
    """Leave out what torchrun says of the processes."""
    return [line for line in printed.splitlines() if re.match("error|stopped|Traceback", line)]


@pytest.mark.slow
def test_an_image_that_one_process_cannot_read_ends_all_with_one_line(
    demo_copy, tmp_path, tiny_settings
):
    words = tiny_settings(demo_copy, tmp_path / "outdir")
    image = demo_copy / (demo_copy / "labeled.txt").read_text().split()[0]
    image.write_bytes(image.read_bytes()[:300])
    with torchrun(2, "train.py", "--config", "demo.yaml", *words) as processes:
        _, said = processes.communicate(timeout=60)
    assert processes.returncode != 0
    lines = [line for line in own_lines(said) if "torch" not in line]
    (line,) = [line for line in lines if line.startswith("error")]
    assert str(image) in line


@pytest.mark.slow
def test_a_mistake_of_all_is_told_once():
    with torchrun(3, "train.py", "--config", "demo.yaml", "seed=x") as processes:
        _, said = processes.communicate(timeout=60)
    assert processes.returncode != 0
    assert said.count("error: ") == 1


@pytest.mark.slow
def test_a_run_of_two_processes_is_stopped_and_goes_on_in_one(
    demo_root, tmp_path, tiny_settings, run_program
):
    words = ["train.py", "--config", "demo.yaml", *tiny_settings(demo_root, tmp_path), "name=cut"]
    words += ["retrain.epochs=1", "supervised.epochs=8"]
    log = tmp_path / "cut" / "log.txt"
    with torchrun(2, *words) as processes:
        deadline = time.monotonic() + 60
        while not (log.is_file() and "epoch 1" in log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        processes.send_signal(signal.SIGTERM)
        _, said = processes.communicate(timeout=60)
    assert said.count("stopped by SIGTERM, all that is done is saved") == 1
    state = checkpoint.load(tmp_path / "cut" / "1_supervised" / "unfinished" / "resume.pth")
    assert 1 <= state["epoch"] < 8
    done = run_program(*words)
    assert done.returncode == 0, done.stderr
    assert "2 processes, cpu, 1 threads before, cpu, " in done.stdout
    assert "what follows may differ in its last digits" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").open()]
    assert [line["epoch"] for line in lines] == [*range(1, 9), 1, 1]
