"""Kill runs at random moments, go on, and compare with a run that was not killed.

python tests/faults.py [--kills 20] [--seed 0]

A tiny demo run is done once without a kill. Then, for every kill, it is begun anew, or begun over
with --from-stage or --fresh; killed with SIGKILL, by turns in a share of the run's duration of its
own and right before or after a file is renamed or removed; and gone on with. Weights, masks,
lists, CSVs, metrics.jsonl and results.json must be the same to the last bit, but for times.
Exit code 1 if one is not.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: a thread pool would not survive the forks
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from dataset.catalog import KINDS  # noqa: E402
from dataset.demo.writing import Scenes, write_demo  # noqa: E402
from utils.errors import exit_with_one_line  # noqa: E402
from utils.files import sha256  # noqa: E402

# What is killed, and the run that it begins with: none, the quiet one, or one of another seed, of
# which nothing may be left.
_COMMANDS = (
    ("", None),
    ("--fresh demo", "other"),
    ("--from-stage 4", "quiet"),
    ("--from-stage 1", "other"),
    ("", None),
)
_TIMES = ("seconds", "images_per_second")
_SETTINGS = """outdir=out device=cpu precision=fp32 workers=1 checkpoint_every=2 evaluate.every=1
    inference.batch_size=3 augment.base_size=48 augment.crop_size=32 pseudo_label.scales=[1.0]
    model.backbone=resnet18 model.channels=null model.pretrained=null
    supervised.iterations=null retrain.iterations=null
    supervised.epochs=2 supervised.batch_size=2 supervised.repeat_below=0
    retrain.epochs=2 retrain.batch_size=2"""


def quiet_run(folder: Path, name: str, *words: str) -> tuple[dict[str, Any], float]:
    """Do the run without a kill and rename its folder; return its outcome and its seconds."""
    start = time.monotonic()
    _end(_start(folder, words))
    duration = time.monotonic() - start
    (folder / "out").rename(folder / name)
    return outcome(folder / name / "demo"), duration


def killed_run(
    folder: Path,
    words: Sequence[str],
    begins: str | None,
    moment: float,
    expected: dict[str, Any],
) -> tuple[float, str, list]:
    """Kill a run, go on, and compare; a run that is over before its kill is done again, sooner.

    Args:
        folder: with the data and the quiet runs.
        words: of the command that is killed.
        begins: folder of the run that it begins with; None for none.
        moment: seconds after the start; or, below 0, how many files are renamed or removed before:
            -3 is right before the third time, -3.5 right after it.
        expected: outcome of the quiet run.

    Returns the moment, the stage under way, and what differs.
    """
    while True:
        shutil.rmtree(folder / "out", ignore_errors=True)
        if begins is not None:
            shutil.copytree(folder / begins, folder / "out")
        process = _start(folder, words, -moment)
        if moment > 0:
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status):
            break
        moment = moment * 0.9 if moment > 0 else math.ceil(moment * 0.9)
    place = stage_under_way(folder / "out" / "demo")
    if _code(_start(folder)) != 0:  # killed before it removed a run of other settings
        _end(_start(folder, words))
    found = outcome(folder / "out" / "demo")
    names = sorted(expected.keys() | found.keys())
    return moment, place, [name for name in names if expected.get(name) != found.get(name)]


def _kill_at(operations: float) -> None:
    """Let this process die right before, or half a number later right after, a file operation."""
    count = 0

    def fatal(operation: Callable[..., None], *args: Any, **keys: Any) -> None:
        nonlocal count
        count += 1
        if count == operations:
            os.kill(os.getpid(), signal.SIGKILL)
        operation(*args, **keys)
        if count + 0.5 == operations:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("replace", "unlink", "rmdir"):
        setattr(os, name, partial(fatal, getattr(os, name)))


def outcome(run: Path) -> dict[str, Any]:
    """Return all that a run computed, by file: digests, and logs without times."""
    made = [path for path in run.glob("[1-6]_*/**/*") if path.is_file()]
    found: dict[str, Any] = {
        str(path.relative_to(run)): sha256(path) for path in made if path.name != "stage.json"
    }
    results = json.loads((run / "results.json").read_text())
    for name in ("environment.json", "metrics.jsonl"):  # they tell times
        del results["files"][name]
    for stage in results["stages"].values():
        for key in _TIMES:
            stage.pop(key, None)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: line[key] for key in line if key not in _TIMES} for line in lines]
    return {**found, "results.json": results, "metrics.jsonl": metrics}


def stage_under_way(run: Path) -> str:
    """Name the last stage that has begun, and whether it has ended."""
    begun = sorted(run.glob("[1-6]_*"))
    if not begun:
        return "before stage 1"
    return f"after {begun[-1].name}" if (begun[-1] / "stage.json").exists() else begun[-1].name


def _start(folder: Path, more: Sequence[str] = (), operations: float = 0) -> int:
    """Begin ``train.py`` in a process of its own, with all imports done; return its id."""
    process = os.fork()
    if process:
        return process
    os.chdir(folder)
    _kill_at(operations)
    with Path("printed.txt").open("a") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    words = [*_SETTINGS.split(), "dataset.root=data", *more]
    sys.argv = ["train.py", "--config", str(ROOT / "configs" / "demo.yaml"), *words]
    code = 1
    try:
        exit_with_one_line(train.main)
        code = 0
    finally:
        os._exit(code)


def _code(process: int) -> int:
    """Wait for a process; return its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _end(process: int) -> None:
    code = _code(process)
    if code:
        raise SystemExit(f"a run failed with {code}")


def main(words: Sequence[str] | None = None) -> None:
    """Print a line a kill."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="draws other moments")
    arguments = parser.parse_args(words)
    failed, chance = 0, random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder, palette = Path(name), KINDS["demo"].palette()
        write_demo(folder / "data", palette, Scenes(10, labeled=4, val=2, test=2, size=(36, 48)))
        quiet_run(folder, "other", "seed=1")
        expected, duration = quiet_run(folder, "quiet")
        print(f"quiet run: {duration:.1f} s, {len(expected)} files", flush=True)
        for number in range(arguments.kills):  # each in its own share of the duration
            command, begins = _COMMANDS[number % len(_COMMANDS)]
            moment = duration * (number + chance.random()) / arguments.kills
            if number % 2:
                moment = -chance.randint(2, 120) / 2
            kill = killed_run(folder, command.split(), begins, moment, expected)
            moment, place, differing = kill
            at = f"{moment:.2f} s" if moment > 0 else f"file {-moment:g}"
            verdict = f"differs: {', '.join(differing)}" if differing else "identical"
            failed += bool(differing)
            print(f"{number + 1:>3} {command:<14} {at:>9}  {place:<22} {verdict}", flush=True)
    print(f"{arguments.kills - failed} of {arguments.kills} identical")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
