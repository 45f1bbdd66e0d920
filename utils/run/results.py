"""What a run says of itself: the table of its stages, and where it ran."""

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torchvision

from utils.device import Device
from utils.distributed import world


def stage_table(stages: dict[str, dict[str, Any]], checkpoint: str) -> str:
    """Lay out what the stages reported, a line each.

    Coverage is the share of the unlabeled images that the stage labeled, chose or learnt from,
    confidence the mean probability of the pseudo labels, weight the mean over pixels of what
    rectification leaves of their loss in the last epoch.

    Args:
        stages: reports by stage name.
        checkpoint: ``last`` or ``best``, how the networks that are scored were picked.
    """
    columns = ("miou", "images", "coverage", "confidence", "weight", "seconds")
    everything = max((report.get("images", 0) for report in stages.values()), default=0)
    titles = (f"mIoU ({checkpoint})", "unlabeled", "coverage", "confidence", "weight", "time")
    lines = [f"{'stage':<16}" + "".join(f"{title:>13}" for title in titles)]
    for name, report in stages.items():
        if "images" in report:
            report = {**report, "coverage": report["images"] / max(1, everything)}
        cells = [_cell(column, report.get(column)) for column in columns]
        lines.append(f"{name:<16}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


def environment(device: Device) -> dict[str, Any]:
    """Return versions, machine, device, commit and the command."""
    return {
        "command": sys.argv,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "machine": platform.platform(),
        "device": str(device.torch_device),
        "precision": device.precision,
        "processes": world(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
    }


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    if column == "seconds":
        return f"{int(value) // 60}:{int(value) % 60:02d}"
    return str(value) if column == "images" else f"{100 * value:.2f} %"


def _git(*words: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
