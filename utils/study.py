"""Compare methods over seeds, each run a ``train.py`` of its own.

python -m utils.study --config demo.yaml --methods supervised,cisc,"cisc select.keep=0.7"
    [--seeds 0,1,2] [--processes 1] [--write docs/results.md] [section.key=value ...]

Runs are in ``<outdir>/<name>_study``. The same command continues where it was stopped; stage 1 of
equal settings is done once and copied.
"""

import json
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from shutil import copytree, rmtree
from threading import Lock
from typing import Any, NamedTuple

import yaml

from utils.config.reading import METHODS, read_config
from utils.config.schema import Config
from utils.errors import Parser, UserError, exit_with_one_line
from utils.files import read_json, read_records, write_json, write_text
from utils.run.comparison import differing_keys

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
LENGTHS = (1, 2, 4)  # of supervised training; the best one is what other methods are compared with
STAGE = "1_supervised"  # which runs share
_OF_LATER_STAGES = {"name", "pseudo_label", "select", "retrain", "stages", "relabel"}


class Job(NamedTuple):
    """A run of the study."""

    row: str  # of the table: the method, and its length if there are several
    words: list[str]  # of train.py's command line
    config: Config

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.outdir) / self.config.name


def plan(
    config: str, methods: Sequence[str], seeds: Sequence[int], settings: Sequence[str]
) -> list[Job]:
    """List the runs: every method with every seed; supervised training at several lengths.

    A method is the name of an overlay, and settings of its own after spaces. One with one
    retraining stage gets twice its length: as many iterations as one with two (of epochs a third
    more: those of stage 4 pass the reliable half alone).

    Raises:
        UserError: a setting is wrong, or one of those that the study makes.
    """
    for setting in settings:
        if setting.partition("=")[0] in ("seed", "name"):
            raise UserError(f"'{setting}': a study names its runs and seeds; use --seeds")
    jobs = []
    name = read_config(config, settings).name
    rows = [
        (method, length)
        for method in methods
        for length in (LENGTHS if method.split()[0] == "supervised" else (1,))
    ]
    for (method, length), seed in product(rows, seeds):  # those that share stage 1: not in a row
        row = method if length == 1 else f"{method} x {length}"
        overlay, *special = method.split()
        if overlay not in METHODS:
            raise UserError(f"--methods: '{overlay}' is not one of {', '.join(METHODS)}")
        run = re.sub(r"[^\w.+-]+", "-", row.replace(" x ", "x"))
        own = [*settings, *special, f"seed={seed}", f"name={run}_{seed}"]
        made = read_config(config, own, overlay)
        own.append(f"outdir={Path(made.outdir) / f'{name}_study'}")
        own.append(_times(made, "supervised", length))
        if 6 in made.stages and 4 not in made.stages:
            own.append(_times(made, "retrain", 2))
        made = read_config(config, own, overlay)
        jobs.append(Job(row, ["--config", config, "--method", overlay, *own], made))
    return jobs


def _times(config: Config, section: str, length: int) -> str:
    """Return a setting that makes a training stage so many times as long."""
    settings = getattr(config, section)
    key = "epochs" if settings.iterations is None else "iterations"
    return f"{section}.{key}={length * getattr(settings, key)}"


def share_stage_1(one: Config, other: Config) -> bool:
    """Tell whether two configs describe the same stage 1."""
    differing = {key.split(".")[0] for key in differing_keys(one, other)}
    # For stability it keeps more checkpoints.
    stability = [config.select.score == "stability" for config in (one, other)]
    return not differing - _OF_LATER_STAGES and stability[0] == stability[1]


def take_over(job: Job, jobs: Sequence[Job]) -> None:
    """Copy stage 1 of another run into the folder of a run that has none yet."""
    if job.folder.exists():
        return
    for other in jobs:
        there = (other.folder / STAGE / "stage.json").is_file()
        if not there or not share_stage_1(job.config, other.config) or not _is_of(other):
            continue
        partial_copy = job.folder.with_name(f"{job.folder.name}.partial")
        rmtree(partial_copy, ignore_errors=True)
        copytree(other.folder / STAGE, partial_copy / STAGE)
        for name in ("lists.json", "environment.json"):
            write_json(partial_copy / name, read_json(other.folder / name))
        records = read_records(other.folder / "metrics.jsonl")
        lines = [f"{json.dumps(r)}\n" for r in records if r.get("stage") == STAGE]
        write_text(partial_copy / "metrics.jsonl", "".join(lines))
        settings = job.config.model_dump(mode="json")
        write_text(partial_copy / "config.yaml", yaml.safe_dump(settings))
        partial_copy.rename(job.folder)
        return


def is_done(job: Job) -> bool:
    """Tell whether a run has results, of these settings."""
    return (job.folder / "results.json").is_file() and _is_of(job)


def _is_of(job: Job) -> bool:
    """Tell whether a run folder was made with the settings that are planned for it."""
    return not differing_keys(read_config(str(job.folder / "config.yaml")), job.config)


def work(jobs: Sequence[Job], processes: int) -> None:
    """Do the runs that are not done, so many at once; one that shares stage 1 waits for its end.

    Raises:
        UserError: runs failed; the others are done.
    """
    locks: list[tuple[Job, Lock]] = []  # of the first of the runs that share stage 1
    started: list[subprocess.Popen] = []

    def lock_of(job: Job) -> Lock:
        for first, lock in locks:
            if share_stage_1(job.config, first.config):
                return lock
        locks.append((job, Lock()))
        return locks[-1][1]

    def run(job: Job, lock: Lock) -> Path | None:
        if is_done(job):
            return None
        log = job.folder.with_suffix(".log")
        with lock:
            take_over(job, jobs)
            log.parent.mkdir(parents=True, exist_ok=True)
            print(f"{datetime.now():%H:%M} {job.folder}", flush=True)
            with log.open("a", encoding="utf-8") as out:
                command = [sys.executable, str(TRAIN), *job.words]
                process = subprocess.Popen(command, stdout=out, stderr=out)
            started.append(process)
            while process.poll() is None and not (job.folder / STAGE / "stage.json").is_file():
                time.sleep(0.5)
        return log if process.wait() else None

    with ThreadPoolExecutor(processes) as pool:
        try:
            failed = [log for log in pool.map(run, jobs, map(lock_of, jobs)) if log]
        except BaseException:  # Ctrl-C and SIGTERM end the runs, too; they save and continue
            pool.shutdown(wait=False, cancel_futures=True)
            for process in started:
                process.terminate()
            raise
    if failed:
        raise UserError(f"{len(failed)} runs failed; their logs: {', '.join(map(str, failed))}")


def table(jobs: Sequence[Job]) -> str:
    """Lay out the results in Markdown: mIoU, differences to the best supervised row, time, crops.

    Means and sample standard deviations over seeds; differences are between runs of one seed.
    """
    results: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for job in jobs:
        results[job.row][job.config.seed] = read_json(job.folder / "results.json")
    mious = {
        row: {seed: 100 * found["miou"] for seed, found in runs.items()}
        for row, runs in results.items()
    }
    supervised = [row for row in mious if row.startswith("supervised")]
    best = max(supervised, key=lambda row: statistics.mean(mious[row].values()), default=None)
    against = "-" if best is None else f"against {best}"
    head = ("method", "mIoU", against, "minutes", "labeled crops", "unlabeled", "by teachers")
    rows = [head, ("---",) + ("---:",) * (len(head) - 1)]
    for row, runs in results.items():
        differences = [mious[row][seed] - mious[best][seed] for seed in runs] if best else []
        stages = [found["stages"].values() for found in runs.values()]
        minutes = [sum(stage["seconds"] for stage in run) / 60 for run in stages]
        crops = [
            sum(stage.get(f"{kind}_crops", 0) for stage in stages[0])
            for kind in ("labeled", "unlabeled", "teacher")
        ]
        compared = "" if row == best or not best else _spread(differences, "+")
        length = f"{statistics.mean(minutes):.1f}"
        rows.append((row, _spread([*mious[row].values()]), compared, length, *map(str, crops)))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _spread(values: Sequence[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{spread}"


def report(jobs: Sequence[Job], command: str) -> str:
    """Return the table with its title, command, machine and date."""
    config = jobs[0].config
    seeds = sorted({job.config.seed for job in jobs})
    environments = [read_json(job.folder / "environment.json") for job in jobs]
    machines = {
        f"{made['machine']}, {made['cores']} cores, {made['threads']} threads a run, "
        f"{made['device']}, {made['precision']}, torch {made['torch']}"
        for made in environments
    }
    commits = {str(made["commit"])[:7] for made in environments}
    kind, labeled = config.dataset.kind, config.dataset.split or config.dataset.labeled
    return (
        f"## {Path(config.outdir).name.removesuffix('_study')}\n\n"
        f"`{command}`\n\n{table(jobs)}\n\n"
        f"Data `{kind}`, labeled `{labeled}`. Mean ± standard deviation over seeds "
        f"{', '.join(map(str, seeds))}; differences are of equal seeds. mIoU of the "
        f"{config.evaluate.checkpoint} checkpoint in %. Minutes are of all stages, shared ones "
        f"too. {'; '.join(sorted(machines))}. Commit {', '.join(sorted(commits))}, "
        f"{datetime.now(timezone.utc):%Y-%m-%d}.\n"
    )


def put_section(file: Path, name: str, text: str) -> None:
    """Write a study's section of a Markdown file, in place of an earlier one of this name."""
    begin, end = f"<!-- study {name} -->\n", f"<!-- end of study {name} -->\n"
    there = file.read_text(encoding="utf-8") if file.is_file() else ""
    section = begin + text + end
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    replaced, count = pattern.subn(lambda _: section, there)
    write_text(file, replaced if count else f"{there}\n{section}".lstrip("\n"))


def _list_of(kind: type, text: str) -> list[Any]:
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"'{text}': give numbers with commas between them") from None


def main() -> None:
    """Read the command line, do the runs, print and write the table."""
    parser = Parser(prog="python -m utils.study", description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="a YAML file, here or in configs/")
    parser.add_argument(
        "--methods",
        required=True,
        help=f"some of {','.join(METHODS)}, with commas between them; settings of one after spaces",
    )
    parser.add_argument("--seeds", default="0,1,2", help="numbers with commas between them")
    parser.add_argument("--processes", type=int, default=1, help="runs at once")
    parser.add_argument("--write", type=Path, help="a Markdown file, such as docs/results.md")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for every run")
    arguments = parser.parse_intermixed_args()
    methods = re.split(r",(?![^\[]*\])", arguments.methods)  # not at commas of stages=[1,2,6]
    seeds = _list_of(int, arguments.seeds)
    if arguments.processes < 1:
        raise UserError(f"--processes: {arguments.processes} is below 1; take a larger one")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    jobs = plan(arguments.config, methods, seeds, arguments.settings)
    work(jobs, arguments.processes)
    text = report(jobs, f"python -m utils.study {shlex.join(sys.argv[1:])}")
    print(text)
    folder = Path(jobs[0].config.outdir)
    write_text(folder / "study.md", text)
    if arguments.write is not None:
        put_section(arguments.write, folder.name.removesuffix("_study"), text)


if __name__ == "__main__":
    exit_with_one_line(main)
