"""Compare methods over seeds, each run a ``train.py`` of its own.

python -m utils.study --config demo.yaml --methods supervised,cisc,"cisc select.keep=0.7"
    [--seeds 0,1,2] [--processes 1] [--write docs/results.md] [section.key=value ...]

Runs are in ``<outdir>/<name>_study``; ``name=...`` names another study. The same command continues
where it was stopped; stage 1 of equal settings is done once and copied.
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
from shutil import copytree, ignore_patterns, rmtree
from threading import Lock
from typing import Any, NamedTuple, NoReturn

import yaml

from utils.config.reading import METHODS, read_config
from utils.config.schema import Config
from utils.errors import Parser, Stopped, UserError, exit_with_one_line
from utils.files import read_json, read_records, write_json, write_text
from utils.run.comparison import differing_keys
from utils.scores import spread

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
LENGTHS = (1, 2, 4)  # of supervised training; the best one is what other methods are compared with
STAGE = "1_supervised"  # which runs share
_OF_LATER_STAGES = {"pseudo_label", "select", "retrain", "stages", "relabel"}


class Job(NamedTuple):
    """A run of the study."""

    row: str  # of the table: the method, and its length if there are several
    words: list[str]  # of train.py's command line
    config: Config

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.outdir) / self.config.name

    @property
    def log(self) -> Path:
        """Takes what the run prints."""
        return self.folder.with_name(f"{self.folder.name}.log")


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
    if len(set(methods)) < len(methods):
        raise UserError("--methods: one is named twice")
    for method in methods:
        overlay, *special = method.split() or [""]
        if overlay not in METHODS:
            raise UserError(f"--methods: '{overlay}' is not one of {', '.join(METHODS)}")
        if any(word.startswith("seed=") for word in [*settings, *special]):
            raise UserError("seed: a study takes several; use --seeds")
        if any(word.startswith(("outdir=", "name=")) for word in special):
            raise UserError(f"--methods: '{method}': the study names its runs, in one outdir")
    jobs = []
    name = read_config(config, settings).name
    rows = [
        (method, length)
        for method in methods
        for length in (LENGTHS if method.split()[0] == "supervised" else (1,))
    ]
    for (method, length), seed in product(rows, seeds):  # neighbours share no stage 1
        row = method if length == 1 else f"{method} x {length}"
        overlay, *special = method.split()
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
    """Tell whether two configs describe the same stage 1, in the same arithmetic."""
    differing = {key.split(".")[0] for key in differing_keys(one, other)} - _OF_LATER_STAGES
    alike = [
        # Stability keeps more checkpoints.
        (config.precision, config.device, config.dataset, config.select.score == "stability")
        for config in (one, other)
    ]
    return not differing and alike[0] == alike[1]


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
        left_out = ignore_patterns("unfinished", "*.partial")  # the other run may still be there
        copytree(other.folder / STAGE, partial_copy / STAGE, ignore=left_out)
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
    kept = read_config(str(job.folder / "config.yaml"))
    return kept.dataset == job.config.dataset and not differing_keys(kept, job.config)


class Children:
    """Processes that are started by threads, until all are ended."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen] = []
        self._ended, self._lock = False, Lock()

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen | None:
        """Start a process that appends its output to a log; None after ``end``."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, log.open("a", encoding="utf-8") as out:
            if self._ended:
                return None
            self._started.append(subprocess.Popen(command, stdout=out, stderr=out))
            return self._started[-1]

    def end(self) -> None:
        """Ask all processes to end, and start no other."""
        with self._lock:
            self._ended = True
            for process in self._started:
                process.terminate()


def _locks(jobs: Sequence[Job]) -> list[Lock]:
    """Return a lock for each run, the same one for runs that share stage 1."""
    locks: list[Lock] = []
    for number, job in enumerate(jobs):
        earlier = zip(jobs[:number], locks, strict=True)
        shared = (lock for other, lock in earlier if share_stage_1(job.config, other.config))
        locks.append(next(shared, Lock()))
    return locks


def work(jobs: Sequence[Job], processes: int) -> None:
    """Do the runs that are not done, so many at once; one that shares stage 1 waits for its end.

    Raises:
        UserError: runs failed; the others are done.
    """
    children = Children()

    def run(job: Job, lock: Lock) -> str | None:
        with lock:
            try:
                if is_done(job):
                    return None
                take_over(job, jobs)
                process = children.start([sys.executable, str(TRAIN), *job.words], job.log)
            except (OSError, UserError) as error:
                return f"{job.folder}: {error}"
            if process is None:
                return None
            print(f"{datetime.now():%H:%M} {job.folder}", flush=True)
            while process.poll() is None and not (job.folder / STAGE / "stage.json").is_file():
                time.sleep(0.5)
        return f"see {job.log}" if process.wait() else None

    with ThreadPoolExecutor(processes) as pool:
        try:
            failed = [why for why in pool.map(run, jobs, _locks(jobs)) if why]
        except BaseException:  # Ctrl-C and SIGTERM end the runs, too; they save and continue
            pool.shutdown(wait=False, cancel_futures=True)
            children.end()
            raise
    if failed:
        raise UserError(f"{len(failed)} runs failed: {'; '.join(failed)}")


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
        compared = "" if row == best or not best else spread(differences, "+")
        length = f"{statistics.mean(minutes):.1f}"
        rows.append((row, spread([*mious[row].values()]), compared, length, *map(str, crops)))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


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


def _stop(number: int, _: object) -> NoReturn:
    raise Stopped(number)


def main() -> None:
    """Read the command line, do the runs, print and write the table."""
    parser = Parser(prog="python -m utils.study", description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="a YAML file, here or in configs/")
    parser.add_argument(
        "--methods",
        required=True,
        help=f"some of {','.join(METHODS)} with commas between them, and settings of one method "
        "after spaces, without spaces in their values",
    )
    parser.add_argument("--seeds", default="0,1,2", help="numbers with commas between them")
    parser.add_argument("--processes", type=int, default=1, help="runs at once")
    parser.add_argument("--write", type=Path, help="a Markdown file, such as docs/results.md")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for every run")
    arguments = parser.parse_intermixed_args()
    # Not at commas of stages=[1,2,6].
    methods = re.split(r",(?![^\[{]*[\]}])", arguments.methods)
    seeds = _list_of(int, arguments.seeds)
    if arguments.processes < 1:
        raise UserError(f"--processes: {arguments.processes} is below 1; take a larger one")
    jobs = plan(arguments.config, methods, seeds, arguments.settings)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        work(jobs, arguments.processes)
    finally:
        signal.signal(signal.SIGTERM, before)
    text = report(jobs, f"python -m utils.study {shlex.join(sys.argv[1:])}")
    print(text)
    folder = Path(jobs[0].config.outdir)
    write_text(folder / "study.md", text)
    if arguments.write is not None:
        put_section(arguments.write, folder.name.removesuffix("_study"), text)


if __name__ == "__main__":
    exit_with_one_line(main)
