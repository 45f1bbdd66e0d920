import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from utils import checkpoint
from utils.config.schema import OptimizerSection
from utils.device import Device
from utils.errors import Stopped, UserError
from utils.optimization import Optimization
from utils.outcomes import Outcomes
from utils.progress import StageBar
from utils.run.log import Log
from utils.run.resume import Journal, Progress
from utils.run.stages import Stage, Stopwatch

STEPS, EPOCHS = 3, 2


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

    def make(checkpoint_every=None):
        folder = tmp_path / "1_supervised"
        config = SimpleNamespace(checkpoint_every=checkpoint_every)
        watch = Stopwatch(folder / "unfinished" / "seconds")
        device = Device("cpu", "fp32")
        return Stage(folder.name, folder, config, device, Log(tmp_path), watch)

    return make


def never(epoch, step, loss):
    raise AssertionError(f"loss {loss} in epoch {epoch}, step {step}")


def test_an_epoch_of_which_nothing_counts_ends_the_stage(stage):
    bar = StageBar("1_supervised", 1, 1, images=1)
    bar.start(0, {})
    bar.update({"loss": torch.tensor(torch.nan)}, torch.tensor(False), 0.1)
    with pytest.raises(UserError, match="1_supervised: no batch of an epoch had a finite loss"):
        bar.means()


def sitting(stage, stop_after=None):
    """Train, or go on; return weights and each epoch's mean loss. Stop after so many iterations."""
    torch.manual_seed(0)
    net, done, means = Net(), 0, []
    optimization = Optimization(
        net, OptimizerSection(lr=0.1), STEPS * EPOCHS, stage.device.scaler()
    )
    bar = StageBar(stage.name, EPOCHS, STEPS, images=1)
    outcomes = Outcomes(never)
    with bar, Progress(stage, net, optimization, bar, outcomes) as at:
        for epoch in range(at.epoch, EPOCHS):
            bar.start(epoch, at.seen)
            for step in range(at.step, STEPS):
                if done == stop_after:
                    raise Stopped(15)
                torch.manual_seed(100 * epoch + step)
                loss = net(torch.randn(4, 1))
                rate = optimization.lr
                optimization.add(loss)
                outcome = optimization.step()
                bar.update({"loss": loss}, outcome.finite, rate)
                outcomes.add(epoch, step, outcome)
                at.step_done()
                done += 1
            numbers = bar.means()
            means.append((numbers["loss"], numbers["lr"]))
            at.epoch_done({"miou": epoch / 10})
    return net.state_dict(), means, at.report


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("iterations", range(STEPS * EPOCHS))
def test_a_stop_after_any_iteration_changes_neither_weights_nor_means(stage, tmp_path, iterations):
    with pytest.raises(Stopped):
        sitting(stage(), stop_after=iterations)
    weights, means, report = sitting(stage())
    for file in (tmp_path / "1_supervised" / "unfinished").iterdir():
        file.unlink()
    expected, all_means, _ = sitting(stage())
    assert same(weights, expected)
    assert means == all_means[-len(means) :]
    assert report == {"miou": 0.1}


def test_iterations_are_kept_as_often_as_checkpoint_every_says(stage):
    made = stage(checkpoint_every=2)
    saved = []
    made.watch.note = lambda: saved.append(checkpoint.load(made.unfinished / "resume.pth"))
    sitting(made)
    assert [(state["epoch"], state["step"]) for state in saved] == [(0, 2), (1, 0), (1, 2), (2, 0)]


def test_a_state_that_is_cut_short_falls_back_to_the_one_before(stage, capsys):
    expected, _, _ = sitting(stage())
    path = stage().unfinished / "resume.pth"
    path.write_bytes(path.read_bytes()[:1000])
    weights, means, _ = sitting(stage())
    assert f"{path}: is not whole; trying the state before it" in capsys.readouterr().out
    assert same(weights, expected)
    assert len(means) == 1  # the second epoch was done again


def test_a_broken_state_never_takes_the_place_of_the_whole_one(stage):
    """The run fell back; the next save is cut short between its two renames."""
    with pytest.raises(Stopped):
        sitting(stage(checkpoint_every=1), stop_after=3)
    path = stage().unfinished / "resume.pth"
    path.write_bytes(b"broken")
    with pytest.raises(Stopped):
        sitting(stage(), stop_after=0)
    whole = path.with_name("resume.previous.pth")
    assert all(torch.load(file, weights_only=True) for file in (path, whole))


def test_a_kill_between_two_renames_leaves_the_state_before(stage):
    sitting(stage())
    (stage().unfinished / "resume.pth").unlink()
    assert len(sitting(stage())[1]) == 1


@pytest.mark.parametrize("content", [b"not a state", None])
def test_two_spoilt_states_are_told_with_the_way_out(stage, content):
    sitting(stage())
    folder = stage().unfinished
    for name in ("resume.pth", "resume.previous.pth"):
        if content is None:
            checkpoint.save(folder / name, {"net": {"another": torch.zeros(1)}})
        else:
            (folder / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        sitting(stage())
    assert str(error.value) == (
        f"{folder / 'resume.pth'}: neither this state nor one before it is whole; do the stage "
        "again with --from-stage 1"
    )


def test_a_full_disk_leaves_the_state_as_it_was(stage, monkeypatch):
    with pytest.raises(Stopped):
        sitting(stage(), stop_after=4)
    path = stage().unfinished / "resume.pth"
    before, save = path.read_bytes(), torch.save

    def full(content, file):
        save(content, file)
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(UserError) as error:
            sitting(stage())
    assert str(error.value).startswith(
        f"{path}: cannot write this file (torch writes no further, the disk may be full"
    )
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.partial"))
    assert sitting(stage())[2] == {"miou": 0.1}


def test_an_epoch_that_was_told_and_not_kept_is_told_once(stage, tmp_path):
    """A kill fell between the line of metrics.jsonl and the state; another cut a line short."""
    with pytest.raises(Stopped):
        sitting(stage(), stop_after=4)
    lines = [{"stage": "1_supervised", "epoch": epoch, "ce": 0.5} for epoch in (1, 2)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"stage": "1_sup')
    sitting(stage())
    assert (tmp_path / "metrics.jsonl").read_text() == json.dumps(lines[0]) + "\n"


@pytest.fixture
def labeling(stage):
    """A stage that wrote the masks of two images."""
    made = stage()
    masks = [made.folder / "masks" / f"{name}.png" for name in "ab"]
    masks[0].parent.mkdir(parents=True)
    for mask in masks:
        mask.write_text(mask.name)
    journal = Journal(made)
    assert journal.read() == {}
    assert journal.add(["a.jpg", "b.jpg"], masks, [0.1, 1 / 3]) == {"a.jpg": 0.1, "b.jpg": 1 / 3}
    return made, masks


def test_confidence_of_whole_masks_is_kept_exactly(labeling):
    assert Journal(labeling[0]).read() == {"a.jpg": 0.1, "b.jpg": 1 / 3}


def test_a_mask_that_changed_or_is_gone_is_no_longer_whole(labeling):
    stage, masks = labeling
    masks[0].write_text("else")
    assert Journal(stage).read() == {"b.jpg": 1 / 3}
    masks[1].unlink()
    assert Journal(stage).read() == {}


def test_lines_that_are_cut_short_or_garbage_do_not_count(labeling):
    stage, masks = labeling
    path = stage.unfinished / "masks.0.jsonl"
    path.write_bytes(b"\xff\n[]\n{}\n" + path.read_bytes() + b'{"image": "c.jpg", "conf')
    assert set(Journal(stage).read()) == {"a.jpg", "b.jpg"}
    assert len(path.read_text().splitlines()) == 2
    Journal(stage).add(["c.jpg"], masks[:1], [0.5])
    assert set(Journal(stage).read()) == {"a.jpg", "b.jpg", "c.jpg"}


def test_a_spoilt_note_of_the_seconds_counts_as_none(tmp_path):
    (tmp_path / "seconds").write_text("many")
    assert Stopwatch(tmp_path / "seconds").seconds < 60
