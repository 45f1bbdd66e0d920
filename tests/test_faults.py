"""What goes wrong in the world while a run works: one line, nothing lost, the run goes on."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, same
from torch.utils.data import DataLoader

import train
from model import fitting
from utils.config.reading import read_config
from utils.errors import Stopped, UserError, exit_with_one_line
from utils.run.signals import defer_signals, ignore_interrupts, stop_here


def weights(stage):
    return torch.load(stage / "checkpoint.pth", weights_only=True)["model"]


@pytest.fixture
def stage_one(monkeypatch, demo_copy, tmp_path, tiny_settings):
    """Do stage 1 alone, with more settings; return its folder."""

    def stop(*_):
        raise Stopped(15)

    monkeypatch.setattr(train, "write_pseudo_labels", stop)

    def do(*words):
        settings = [*tiny_settings(demo_copy, tmp_path), "retrain.batch_size=2", *words]
        config = read_config("demo.yaml", settings)
        with pytest.raises(Stopped):
            train.train(config)
        return tmp_path / config.name / "1_supervised"

    return do


@pytest.mark.exhaustive
def test_an_image_that_is_gone_for_a_while_changes_nothing(
    stage_one, demo_copy, tmp_path, monkeypatch
):
    expected = stage_one("name=quiet")
    image, epoch_done = demo_copy / "JPEGImages" / "0001.jpg", fitting.Progress.epoch_done
    content = image.read_bytes()

    def deleted(self, report):
        epoch_done(self, report)
        image.unlink()

    with monkeypatch.context() as patched:
        patched.setattr(fitting.Progress, "epoch_done", deleted)
        with pytest.raises(UserError, match=r"0001\.jpg: no such file; correct the list"):
            stage_one("name=cut")
    image.write_bytes(content)
    assert same(weights(stage_one("name=cut")), weights(expected))
    runs = expected.parent, stage_one("name=cut").parent
    one, other = ((run / "metrics.jsonl").read_text().count("\n") for run in runs)
    assert one == other > 0


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def workers_of(process):
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


@pytest.fixture
def typed(demo_root, tmp_path, tiny_settings):
    """Begin ``train.py`` as a user would; ``limit`` is the largest file it may write, in MiB."""

    def start(limit=None):
        words = [*tiny_settings(demo_root, tmp_path), "workers=1", "name=cut", "checkpoint_every=2"]
        program = [sys.executable, str(ROOT / "train.py"), "--config", "demo.yaml", *words]
        shell = f"ulimit -f {limit * 1024}; " if limit else ""
        return subprocess.Popen(
            ["bash", "-c", shell + 'exec "$@"', "bash", *program],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def last_words(process):
    said = process.communicate(timeout=120)[1]
    assert said.count("\n") == 1, said
    return said.rstrip("\n")


STOPPED = "the same command, without --from-stage and --fresh, continues from the last save"


@pytest.mark.exhaustive
def test_a_full_disk_a_dead_worker_and_two_signals_change_nothing(finished, typed, tmp_path):
    run = tmp_path / "cut"
    process = typed(limit=90)  # MiB; less than the state of a training stage
    line = last_words(process)
    assert process.returncode == 2
    assert line.startswith(f"error: {run / '1_supervised/unfinished/resume.pth'}: cannot write")

    process = typed()
    wait_for(run / "1_supervised/unfinished/resume.pth", process)
    for worker in workers_of(process):
        os.kill(int(worker), signal.SIGKILL)
    line = last_words(process)
    assert process.returncode == 2
    assert line.startswith("error: workers: DataLoader worker (pid")
    assert line.endswith("if memory ran out lower workers; the same command continues")

    for number, place in (
        (signal.SIGINT, "2_pseudo_label/unfinished/masks.0.jsonl"),
        (signal.SIGTERM, "4_retrain/unfinished/resume.pth"),
    ):
        process = typed()
        wait_for(run / place, process)
        os.killpg(process.pid, number)  # the workers get it too, as from Ctrl-C or a scheduler
        assert last_words(process) == f"stopped by {number.name}; {STOPPED}"
        assert process.returncode == 128 + number

    process = typed()
    assert process.communicate(timeout=120)[1] == ""
    assert same(weights(run / "6_retrain"), weights(finished[0] / "6_retrain"))
    one, other = ((x / "metrics.jsonl").read_text().count("\n") for x in (run, finished[0]))
    assert one == other > 0


@pytest.mark.exhaustive
def test_killed_runs_end_as_a_quiet_one(run_program):
    done = run_program("tests/faults.py", "--kills", 2)
    assert done.stdout.endswith("2 of 2 identical\n"), done.stdout + done.stderr


TWICE = """
import os, signal, sys
from utils.errors import exit_with_one_line
from utils.run.signals import defer_signals
def main():
    with defer_signals():
        for number in sys.argv[1:]:
            os.kill(os.getpid(), int(number))
            print("still here", flush=True)
exit_with_one_line(main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_the_next_place_and_not_before(number):
    with defer_signals():
        stop_here()
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped) as stopped:
            stop_here()
    assert stopped.value.number == number
    assert str(stopped.value) == f"stopped by {number.name}"


def test_outside_of_the_block_signals_are_as_before():
    before = signal.getsignal(signal.SIGINT)
    with defer_signals():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
    stop_here()


@pytest.mark.parametrize(
    ("numbers", "code", "passed"),
    [
        ([signal.SIGINT, signal.SIGINT], 130, 1),  # a second Ctrl-C ends the program at once
        ([signal.SIGTERM, signal.SIGTERM], 0, 2),  # of a scheduler, and of torchrun
    ],
)
def test_a_second_signal(run_program, numbers, code, passed):
    done = run_program("-c", TWICE, *map(int, numbers))
    assert (done.returncode, done.stdout) == (code, "still here\n" * passed)


def kill(name, pid):
    """Send a signal as another process: one of its parent's own ends a worker without an error."""
    subprocess.run(["kill", "-s", name, str(int(pid))], check=False)


class Pids:
    """Samples that say which worker read them."""

    def __getitem__(self, _):
        time.sleep(0.05)  # a signal comes while it reads: one that holds a queue's lock keeps it
        return os.getpid()

    def __len__(self):
        return 100


def test_workers_outlive_an_interrupt_and_their_death_by_a_signal_to_all_is_a_stop():
    loader = DataLoader(Pids(), num_workers=1, worker_init_fn=ignore_interrupts)
    with pytest.raises(Stopped) as stopped, defer_signals():  # noqa: PT012
        for count, pid in enumerate(loader):
            kill("INT", pid)
            if count == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                kill("TERM", pid)
    assert stopped.value.number == signal.SIGTERM


class Broken(Pids):
    def __getitem__(self, _):
        raise UserError("a.jpg: cannot read this picture")


def test_an_error_in_a_worker_is_its_line():
    loader = DataLoader(Broken(), num_workers=1)
    with pytest.raises(UserError, match=r"^a\.jpg: cannot read this picture$"):
        next(iter(loader))


def test_a_worker_that_dies_alone_is_an_error():
    loader = DataLoader(Pids(), num_workers=1, worker_init_fn=ignore_interrupts)
    died = (RuntimeError, ConnectionResetError)  # the second while it hands over a sample
    with pytest.raises(died, match=r"DataLoader worker|reset by peer"), defer_signals():  # noqa: PT012
        for pid in loader:
            kill("TERM", pid)


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset"), BrokenPipeError(32, "pipe"), EOFError()]
)
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_named(error, complaint):
    def rebuild_storage_fd():  # as torch's function is called that receives tensors
        raise error

    line = complaint(SimpleNamespace(__file__="train.py", main=rebuild_storage_fd))
    assert line.startswith("error: workers: DataLoader worker (pid unknown) ended while it")
    assert line.endswith("if memory ran out lower workers; the same command continues")


def test_torch_receives_tensors_in_the_function_that_is_looked_for():
    assert callable(torch.multiprocessing.reductions.rebuild_storage_fd)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("could not create a primitive"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_is_told_with_what_takes_less(error, complaint):
    def main():
        raise error

    line = complaint(SimpleNamespace(main=main, __file__="program.py"))
    assert line.startswith("error: memory: ")
    assert "raise supervised.accumulate in stage 1, retrain.accumulate in stages 4 and 6" in line


SAY = """
import sys
from pathlib import Path
from utils.errors import exit_with_one_line
from utils.run.log import Log
def main():
    log = Log(Path(sys.argv[1]))
    for number in range(3):
        log.say(f"ü {number}")
exit_with_one_line(main)
"""


@pytest.mark.parametrize("to", ["> /dev/full", "| head -0", "> out"])
def test_a_run_goes_on_where_nothing_can_be_printed(tmp_path, to):
    command = f'set -o pipefail; "$0" -c "$1" "$2" {to}'
    words = ["bash", "-c", command, sys.executable, SAY, str(tmp_path)]
    places = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run(words, env={**os.environ, **places}, cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "log.txt").read_text("utf-8").count("ü") == 3


PRINT = """
from utils.errors import exit_with_one_line
exit_with_one_line(lambda: print("a table"))
"""


@pytest.mark.parametrize(
    ("to", "why"), [("> /dev/full", "No space left on device"), ("| head -0", "Broken pipe")]
)
def test_what_cannot_be_printed_is_told(tmp_path, to, why):
    command = f'set -o pipefail; (sleep 0.5; "$0" -c "$1") {to}'  # head has ended by then
    places = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, PRINT],
        env={**places, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == f"error: standard output: {why}; not all was printed\n"
    assert done.returncode == 2


def test_files_that_the_system_does_not_open_are_told(complaint):
    def main():
        raise OSError(errno.EMFILE, "Too many open files", "a.jpg")

    line = complaint(SimpleNamespace(main=main, __file__="program.py"))
    assert line.startswith("error: files: the system lets this program open no more")


def test_a_path_that_the_system_refuses_is_told(complaint, tmp_path):
    name = tmp_path / ("x" * 300)
    line = complaint(SimpleNamespace(main=name.is_file, __file__="program.py"))
    assert line.startswith(f"error: {tmp_path}/xxx")
    assert line.endswith("...: File name too long; correct the path, or who may read it")


def test_an_error_of_ours_keeps_its_traceback():
    def program():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        exit_with_one_line(program)
