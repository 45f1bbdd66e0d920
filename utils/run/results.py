"""The table of a run's stages, and the record of the machine that it ran on."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torchvision

from utils.device import Device
from utils.distributed import world
from utils.scores import describe_mean


def stage_table(stages: dict[str, dict[str, Any]], checkpoint: str) -> str:
    """Lay out the reports of the stages, a line each.

    Args:
        stages: reports by stage name.
        checkpoint: ``last`` or ``best``, how the networks whose mIoU is shown were picked.

    Returns:
        Lines of columns: mIoU on val; iterations; labeled and unlabeled crops that passed the
        student; crops that passed teachers; unlabeled images that the stage labels, selects or
        trains on; mean probability of the pseudo labels; mean weight of a pseudo-labeled pixel's
        loss in the last epoch; time.
    """
    titles = ("iterations", "crops l + u", "teacher", "unlabeled", "confidence", "weight", "time")
    rows = [("stage", f"mIoU ({checkpoint})", *titles)]
    for name, report in stages.items():
        seconds, crops = int(report["seconds"]), "-"
        if "iterations" in report:
            crops = f"{report['labeled_crops']} + {report['unlabeled_crops']}"
        numbers = [str(report.get(key, "-")) for key in ("iterations", "teacher_crops", "images")]
        numbers.insert(1, crops)
        shares = [_percent(report.get(key)) for key in ("confidence", "weight")]
        time = f"{seconds // 60}:{seconds % 60:02d}"
        rows.append((name, _percent(report.get("miou")), *numbers, *shares, time))
    lines = [f"{name:<16}" + "".join(f"{cell:>13}" for cell in cells) for name, *cells in rows]
    for name, report in stages.items():
        if few := describe_mean(report.get("per_class_iou", {})):
            lines.append(f"{name}: mIoU {few}")
        if stop := describe_stop(report):
            lines.append(f"{name}: {stop}")
    return "\n".join(lines)


def describe_stop(report: Mapping[str, Any]) -> str | None:
    """Say where ``evaluate.patience`` ended a training stage; None where it did not."""
    done, planned = (report.get(key) for key in ("iterations", "planned_iterations"))
    if planned in (None, done):
        return None
    return f"stopped early at {done} of {planned} iterations, by val"


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


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _git(*words: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
