import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.run.lock import locked

ROOT = Path(__file__).parents[1]
HOLD = (
    "import sys, pathlib, utils.run.lock\n"
    "with utils.run.lock.locked(pathlib.Path(sys.argv[1]), print):"
)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock, and a child of it, as one that reads images."""
    code = f"{HOLD}\n    import os, time\n    os.fork() and print('held', flush=True)\n"
    command = [sys.executable, "-c", code + "    time.sleep(60)", str(tmp_path / "lock")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def take(path):
    said = []
    with locked(path, said.append):
        return said


def test_a_second_run_is_refused_with_the_holder(tmp_path, holder):
    with pytest.raises(UserError) as error:
        take(tmp_path / "lock")
    assert str(error.value) == (
        f"{tmp_path / 'lock'}: another run works in this folder (pid {holder.pid} on "
        f"{platform.node()}); wait for it, stop it, or set name=... for another run"
    )


def test_a_killed_runs_lock_is_taken_over_with_a_word(tmp_path, holder):
    """Its child lives on for a while."""
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    (line,) = take(tmp_path / "lock")
    gone = f"pid {holder.pid} on {platform.node()}"
    assert line == f"{tmp_path / 'lock'}: taken over from {gone}, which is gone"


def test_a_lock_that_was_let_go_of_is_taken_without_a_word(tmp_path):
    assert take(tmp_path / "lock") == []
    assert take(tmp_path / "lock") == []
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "lock", print):
        raise KeyboardInterrupt
    assert take(tmp_path / "lock") == []


def test_another_machines_lock_is_not_taken_over(tmp_path):
    (tmp_path / "lock").write_text("pid 7 on elsewhere")
    with pytest.raises(UserError) as error:
        take(tmp_path / "lock")
    assert str(error.value) == (
        f"{tmp_path / 'lock'}: a run on another machine works in this folder or was killed "
        "(pid 7 on elsewhere); if it was killed, delete this file"
    )
