import json
from types import SimpleNamespace

import pytest
import torch
from conftest import refusal, same
from torch import nn

from utils import checkpoint
from utils.device import Device
from utils.errors import Stopped
from utils.run.log import Log
from utils.run.resume import Journal, Progress
from utils.run.stages import Stage, Stopwatch

STEPS, EPOCHS = 3, 2
A, B = {"confidence": 0.1, "doubt": [1 / 3, 0.0]}, {"confidence": 1 / 3, "doubt": [0.1, 1e-6]}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)
        nn.init.ones_(self.backbone.weight)

    def forward(self, batch):
        return self.head(self.backbone(batch)).square().mean() + self.backbone.weight.sum()


@pytest.fixture
def stage(tmp_path):
    """A stage in a folder; the config has the one key that saving looks at."""
    folder, device = tmp_path / "1_supervised", Device("cpu", "fp32")

    def make(checkpoint_every=None):
        config = SimpleNamespace(checkpoint_every=checkpoint_every)
        watch = Stopwatch(folder / "unfinished" / "seconds")
        return Stage(folder.name, folder, config, device, Log(tmp_path), watch)

    return make


class Bar:
    """What Progress asks of a progress bar: the sum of an epoch's losses."""

    def start(self, seen):
        self.sum = seen.get("sum", 0.0)

    def state_dict(self):
        return {"sum": self.sum}


def train(stage, stop_after=None):
    """Train, or continue; return weights and each epoch's loss. Stop after so many iterations."""
    torch.manual_seed(0)
    net, bar, done, losses = Net(), Bar(), 0, []
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    with Progress(stage, net, sgd, bar) as at:
        for epoch in range(at.epoch, EPOCHS):
            bar.start(at.seen)
            for step in range(at.step, STEPS):
                if done == stop_after:
                    raise Stopped(15)
                torch.manual_seed(100 * epoch + step)
                sgd.zero_grad()
                loss = net(torch.randn(4, 1))
                loss.backward()
                sgd.step()
                bar.sum += loss.item()
                at.step_done()
                done += 1
            losses.append(bar.sum)
            at.epoch_done({"miou": epoch / 10})
    return net.state_dict(), losses, at.report


@pytest.mark.parametrize("iterations", range(STEPS * EPOCHS))
def test_a_stop_after_any_iteration_changes_neither_weights_nor_losses(stage, tmp_path, iterations):
    with pytest.raises(Stopped):
        train(stage(), stop_after=iterations)
    weights, losses, report = train(stage())
    for file in (tmp_path / "1_supervised" / "unfinished").iterdir():
        file.unlink()
    expected, all_losses, _ = train(stage())
    assert same(weights, expected)
    assert losses == all_losses[-len(losses) :]
    assert report == {"miou": 0.1}


def test_iterations_are_kept_as_often_as_checkpoint_every_says(stage):
    made = stage(checkpoint_every=2)
    saved = []
    made.watch.note = lambda: saved.append(checkpoint.load(made.unfinished / "resume.pth"))
    train(made)
    assert [(state["epoch"], state["step"]) for state in saved] == [(0, 2), (1, 0), (1, 2), (2, 0)]


@pytest.mark.parametrize("content", [b"not a state", None])
def test_a_damaged_state_is_named_with_the_way_out(stage, content):
    train(stage())
    path = stage().unfinished / "resume.pth"
    if content is None:
        checkpoint.save(path, {"net": {"another": torch.zeros(1)}})
    else:
        path.write_bytes(content)
    assert refusal(train, stage()) == (
        f"{path}: not a state of this stage; do the stage again with --from-stage 1"
    )


def test_a_full_disk_leaves_the_state_as_it_was(stage, monkeypatch):
    with pytest.raises(Stopped):
        train(stage(), stop_after=4)
    path = stage().unfinished / "resume.pth"
    before, save = path.read_bytes(), torch.save

    def full(content, file):
        save(content, file)
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        line = refusal(train, stage())
    told = "cannot write this file (torch writes no further, the disk may be full"
    assert line.startswith(f"{path}: {told}")
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.partial"))
    assert train(stage())[2] == {"miou": 0.1}


def test_an_epoch_that_was_told_and_not_kept_is_told_once(stage, tmp_path):
    """A kill fell between the line of metrics.jsonl and the state; another cut a line short."""
    with pytest.raises(Stopped):
        train(stage(), stop_after=4)
    lines = [{"stage": "1_supervised", "epoch": epoch, "ce": 0.5} for epoch in (1, 2)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"stage": "1_sup')
    train(stage())
    assert (tmp_path / "metrics.jsonl").read_text() == json.dumps(lines[0]) + "\n"


@pytest.fixture
def labeling(stage):
    """A stage that wrote the masks of two images."""
    made = stage()
    masks = [made.folder / "masks" / f"{name}.png" for name in "ab"]
    masks[0].parent.mkdir(parents=True)
    for mask in masks:
        mask.write_text(mask.name)
    votes = made.folder / "votes" / "b.npy"  # of one image
    votes.parent.mkdir()
    votes.write_text("votes")
    files = [masks[:1], [masks[1], votes]]
    journal = Journal(made)
    assert journal.read() == {}
    assert journal.add(["a.jpg", "b.jpg"], files, [A, B]) == {"a.jpg": A, "b.jpg": B}
    return made, masks


def test_what_was_found_of_masks_that_are_there_is_kept_exactly(labeling):
    stage, masks = labeling
    assert Journal(stage).read() == {"a.jpg": A, "b.jpg": B}
    masks[0].unlink()
    assert Journal(stage).read() == {"b.jpg": B}


def test_a_mask_of_which_a_power_cut_left_a_part_is_written_again(labeling):
    stage, masks = labeling
    masks[1].write_text("")
    assert Journal(stage).read() == {"a.jpg": A}


def test_an_image_whose_votes_are_gone_or_cut_short_is_done_again(labeling):
    stage, _ = labeling
    votes = stage.folder / "votes" / "b.npy"
    votes.write_text("vote")
    assert Journal(stage).read() == {"a.jpg": A}
    votes.unlink()
    assert Journal(stage).read() == {"a.jpg": A}


def test_lines_that_are_cut_short_or_garbage_do_not_count(labeling):
    stage, masks = labeling
    path = stage.unfinished / "masks.0.jsonl"
    edited = b'{"image": [], "found": {}, "files": {}}\n{"image": "e", "found": {}, "files": {}}\n'
    path.write_bytes(b"\xff\n[]\n{}\n" + edited + path.read_bytes() + b'\n{"image": "c.jpg", "fou')
    assert set(Journal(stage).read()) == {"a.jpg", "b.jpg"}
    Journal(stage).add(["d.jpg"], [masks[:1]], [{}])
    path.rename(path.with_name("masks.1.jsonl"))  # of another process
    assert set(Journal(stage).read()) == {"a.jpg", "b.jpg", "d.jpg"}


def test_a_spoilt_note_of_the_seconds_counts_as_none(tmp_path):
    (tmp_path / "seconds").write_text("many")
    assert Stopwatch(tmp_path / "seconds").seconds < 60
