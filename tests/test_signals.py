import os
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from utils.errors import Stopped, exit_with_one_line
from utils.run.signals import ignore_interrupts, stop_here, stopping_later

TWICE = """
import os, signal, sys
from utils.errors import exit_with_one_line
from utils.run.signals import stopping_later
def main():
    with stopping_later():
        for number in sys.argv[1:]:
            os.kill(os.getpid(), int(number))
            print("still here", flush=True)
exit_with_one_line(main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_the_next_place_and_not_before(number):
    with stopping_later():
        stop_here()
        os.kill(os.getpid(), number)
        with pytest.raises(Stopped) as stopped:
            stop_here()
    assert stopped.value.number == number
    assert str(stopped.value) == f"stopped by {number.name}"


def test_outside_of_the_block_signals_are_as_before():
    before = signal.getsignal(signal.SIGINT)
    with stopping_later():
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
    with pytest.raises(Stopped) as stopped, stopping_later():  # noqa: PT012
        for count, pid in enumerate(loader):
            kill("INT", pid)
            if count == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                kill("TERM", pid)
    assert stopped.value.number == signal.SIGTERM


def test_a_worker_that_dies_alone_is_an_error():
    loader = DataLoader(Pids(), num_workers=1, worker_init_fn=ignore_interrupts)
    with pytest.raises(RuntimeError, match="DataLoader worker"), stopping_later():  # noqa: PT012
        for pid in loader:
            kill("TERM", pid)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_memory_that_runs_out_is_told_with_what_takes_less(error, complaint):
    def main():
        raise error

    line = complaint(SimpleNamespace(main=main, __file__="program.py"))
    assert line.startswith("error: memory: ")
    assert "raise supervised.accumulate and retrain.accumulate, or lower batch_size" in line


def test_an_error_of_ours_keeps_its_traceback():
    def program():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        exit_with_one_line(program)
