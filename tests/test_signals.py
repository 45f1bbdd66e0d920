import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils.errors import Stopped
from utils.run import signals
from utils.run.signals import stop_here, stopping_later

ROOT = Path(__file__).parents[1]
TWICE = """
import os, signal
from utils.run.signals import stopping_later
with stopping_later():
    os.kill(os.getpid(), signal.SIGINT)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("not reached", flush=True)
"""
WORKER = """
import os, signal, time
from utils.run.signals import leave_to_parent
leave_to_parent(0)
print("ready", flush=True)
time.sleep(60)
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


def test_while_processes_stop_together_a_late_signal_ends_none(monkeypatch):
    """torchrun sends another to those that still save when the first has ended."""
    monkeypatch.setattr(signals, "world", lambda: 2)
    monkeypatch.setattr(signals, "_ECHO", -1.0)
    monkeypatch.setattr(signals, "largest", lambda number: number)
    with stopping_later():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            stop_here()
        os.kill(os.getpid(), signal.SIGTERM)  # would have ended this process at once


def test_outside_of_the_block_signals_are_as_before():
    before = signal.getsignal(signal.SIGINT)
    with stopping_later():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
    stop_here()


def test_a_second_signal_ends_at_once():
    command = [sys.executable, "-c", TWICE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == "still here\n"


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="macOS")
def test_a_worker_ends_when_its_parent_says_so_and_for_nobody_else():
    code = "import os, signal, sys\nos.kill(int(sys.argv[1]), int(sys.argv[2]))"
    command = [sys.executable, "-c", WORKER]
    # As in a forked worker, there is one thread: others would take the signals that it blocks.
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=alone
    ) as worker:
        assert worker.stdout.readline() == "ready\n"
        for number in (signal.SIGINT, signal.SIGTERM):
            another = [sys.executable, "-c", code, str(worker.pid), str(int(number))]
            subprocess.run(another, check=True)
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(0.5)
        worker.terminate()
        assert worker.wait(10) == 0
