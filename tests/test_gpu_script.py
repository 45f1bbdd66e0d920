"""The script that measures on a GPU runs through; what it measures on a CPU counts for nothing."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.exhaustive
def test_the_script_for_gpus_runs_in_its_tiny_form():
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "tests/gpu.sh", "tiny"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| select |" in done.stdout
    assert "6_retrain: 8 images in" in done.stdout
    for stage in ("pseudo-label", "select", "evaluate"):
        assert f"\n{stage}: " in done.stdout
