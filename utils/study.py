"""Compare methods over seeds, on equal terms, each run a ``train.py`` of its own.

python -m utils.study --config demo.yaml --methods supervised,ladder,"cisc select.keep=0.7 tried=3"
    [--seeds 0,1,2] [--lists 1] [--processes 1] [--write docs/results.md] [section.key=value ...]

Runs are in ``<outdir>/<name>_study``; ``name=...`` names another study. Rerun the same command to
resume. Stage 1 is trained once for all rows whose settings of it agree, and every row gets as many
iterations of retraining. ``supervised`` is trained at three lengths, and the best one is what other
rows are compared with. ``ladder`` stands for the rows from the paper to ours, a step a row.
"""

import json
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
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
from utils.config.stages import readers
from utils.document import check_section, put_section
from utils.errors import Parser, Stopped, UserError, exit_with_one_line
from utils.files import read_json, read_records, read_text, sha256, write_json, write_text
from utils.outputs import Output, refuse_outputs
from utils.run.comparison import differing_keys
from utils.run.folder import STAGES, read_environment, read_kept, read_results
from utils.run.results import describe_stop
from utils.run.stages import lock_folder
from utils.scores import describe_mean, group_of, mean_and_spread

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
LENGTHS = (1, 2, 4)  # of supervised training; the best one is what other methods are compared with
STAGE = "1_supervised"  # which runs share
FOLDS = [name for name in STAGES if name.startswith("1_fold")]  # ... if labeled patches vote


# From the paper to ours; each row adds its settings to those of the row above.
LADDER = (
    "",  # as published
    "retrain.start=teacher",  # on equal terms with what starts from stage 1
    "retrain.mix=unlabeled",  # CutMix
    "pseudo_label.threshold=0.6",
    "retrain.weight=ones",
)


class Row(NamedTuple):
    """A row of the table, as the command names it."""

    title: str  # the method and its settings; its length, if there are several
    method: str
    settings: tuple[str, ...] = ()  # key=value
    length: int = 1  # of stage 1
    tried: int = 1  # settings that were tried to find these


class Job(NamedTuple):
    """A run of the study."""

    row: Row
    words: list[str]  # of train.py's command line
    config: Config
    draw: tuple[int, int]  # seed and labeled list: rows are compared draw by draw

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.outdir) / self.config.name

    @property
    def log(self) -> Path:
        """Takes what the run prints."""
        return self.folder.with_name(f"{self.folder.name}.log")


def read_rows(methods: Sequence[str]) -> list[Row]:
    """Read what ``--methods`` names.

    Args:
        methods: names of overlays, each with settings of its own after spaces, and ``tried=N``; or
            ``ladder``, whose last row takes the settings after it.

    Raises:
        UserError: no such method, one that is named twice, a setting that the study makes.
    """
    rows: list[Row] = []
    for text in methods:
        method, *words = text.split() or [""]
        if method == "ladder":
            steps = [" ".join(LADDER[: n + 1]).split() for n in range(len(LADDER))]
            rows += [Row(" ".join(["cisc", *step]), "cisc", tuple(step)) for step in steps]
            # Without the consistency loss of stage 1; then with votes.
            silent = "pseudo_label.neighbours=false"
            rows.append(Row(f"cisc_patch {silent}", "cisc_patch", (silent,)))
            method = "cisc_patch"
        if method not in METHODS:
            raise UserError(f"--methods: '{method}' is not one of {', '.join(METHODS)}, ladder")
        for word in words:
            if word.startswith("seed="):
                raise UserError("seed: a study takes several; use --seeds")
            if word.startswith(("outdir=", "name=", "method=")):
                raise UserError(f"--methods: '{text}': the study names its runs, in one outdir")
        tried = [word.removeprefix("tried=") for word in words if word.startswith("tried=")]
        if any(not number.isdecimal() or int(number) < 1 for number in tried):
            raise UserError(f"--methods: '{text}': tried=N counts the settings that were tried")
        settings = tuple(word for word in words if not word.startswith("tried="))
        title, count = " ".join([method, *settings]), int(tried[-1]) if tried else 1
        for length in LENGTHS if method == "supervised" else (1,):
            named = title if length == 1 else f"{title} x {length}"
            rows.append(Row(named, method, settings, length, count))
    titles = [row.title for row in rows]
    if twice := next((title for title in titles if titles.count(title) > 1), None):
        raise UserError(f"--methods: '{twice}' is named twice")
    return rows


def plan(
    config: str, rows: Sequence[Row], draws: Sequence[tuple[int, int]], settings: Sequence[str]
) -> list[Job]:
    """List the runs: every row with every draw of seed and labeled list.

    A method with one retraining stage gets twice its length: as many iterations as one with two (of
    epochs a third more: those of stage 4 pass the reliable half alone).

    Raises:
        UserError: a setting is wrong, or one of those that the study makes.
    """
    if any(word.startswith("seed=") for word in settings):
        raise UserError("seed: a study takes several; use --seeds")
    plain = read_config(config, settings)
    study = Path(plain.outdir) / f"{plain.name}_study"
    jobs = []
    for row, (seed, number) in product(rows, draws):
        run = re.sub(r"[^\w.+-]+", "-", row.title.replace(" x ", "x"))
        own = [*settings, *row.settings, f"seed={seed}", f"outdir={study}"]
        own.append(f"name={run}_{seed}" + (f"_list{number}" if number else ""))
        if number:
            lists = study.absolute() / "lists" / str(number)
            own += [f"dataset.{name}={lists / name}.txt" for name in ("labeled", "unlabeled")]
        made = read_config(config, own, row.method)
        own.append(_times(made, "supervised", row.length))
        if 6 in made.stages and 4 not in made.stages:
            own.append(_times(made, "retrain", 2))
        made = read_config(config, own, row.method)
        jobs.append(
            Job(row, ["--config", config, "--method", row.method, *own], made, (seed, number))
        )
    return jobs


def draw_lists(config: Config, number: int, folder: Path) -> None:
    """Draw a labeled list as long as the config's, from it and the images of ``panels.truth``.

    Where ``dataset.groups`` keeps images together, as slices of a patient, as many groups are drawn
    as the config's list has.

    Args:
        config: of the study.
        number: of the list; the same one is drawn every time.
        folder: gets ``labeled.txt`` and ``unlabeled.txt``.

    Raises:
        UserError: there is no list of true masks to draw from, or not of all unlabeled images.
    """
    section, truth = config.dataset, config.panels.truth
    if truth is None or section.split is not None:
        raise UserError(
            "--lists: other labeled lists are drawn from dataset.labeled and panels.truth, a list "
            "of the unlabeled images with their masks; set panels.truth=LIST, or leave --lists out"
        )
    root = Path(section.root)
    labeled, others = (_read_lines(root / name) for name in (section.labeled, truth))
    unlabeled = root / section.unlabeled
    if unlabeled.is_file() and {*_read_lines(unlabeled)} != {*others}:
        raise UserError(
            f"--lists: {truth} and {section.unlabeled} do not list the same images, so that other "
            "labeled lists would leave other numbers unlabeled; list them all in both"
        )
    pool, groups = labeled | others, defaultdict(list)
    for image in sorted(pool):
        groups[group_of(image, section.groups)].append(image)
    count = len({group_of(image, section.groups) for image in labeled})
    names = random.Random(number).sample(sorted(groups), k=count)
    drawn = sorted(image for name in names for image in groups[name])
    rest = sorted({*pool} - {*drawn})
    unlabeled = [f'"{image}"' if image.split() != [image] else image for image in rest]
    lines = {"labeled": map(pool.get, drawn), "unlabeled": unlabeled}
    for name in lines:
        write_text(folder / f"{name}.txt", "".join(f"{line}\n" for line in lines[name]))


def _read_lines(path: Path) -> dict[str, str]:
    """Read the lines of a list, by the image that each begins with, as lists of images name it."""
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    images = (re.match(r'"[^"]*"|\S+', line)[0].strip('"') for line in lines)
    return {i.replace("\\", "/").lstrip("/"): line for i, line in zip(images, lines, strict=True)}


def _times(config: Config, section: str, length: int) -> str:
    """Return a setting that makes a training stage so many times as long."""
    settings = getattr(config, section)
    key = "epochs" if settings.iterations is None else "iterations"
    return f"{section}.{key}={length * getattr(settings, key)}"


def share_stage_1(one: Config, other: Config) -> bool:
    """Tell whether two configs describe the same stage 1, in the same arithmetic."""
    differing = [key for key in differing_keys(one, other) if 1 in readers(key)]
    alike = [(config.precision, config.device, config.dataset) for config in (one, other)]
    return not differing and alike[0] == alike[1]


def take_over(job: Job, jobs: Sequence[Job]) -> None:
    """Copy stage 1 of another run, and its folds, into the folder of a run that has none yet."""
    if job.folder.exists():
        return
    votes = 2 in job.config.stages and job.config.pseudo_label.neighbours
    stages = [STAGE, *(FOLDS if votes else ())]

    def lacking(other: Job) -> int:
        return sum(not (other.folder / name / "stage.json").is_file() for name in stages)

    for other in sorted(jobs, key=lacking):
        there = (other.folder / STAGE / "stage.json").is_file()
        if not there or not share_stage_1(job.config, other.config) or not _is_of(other):
            continue
        partial_copy = job.folder.with_name(f"{job.folder.name}.partial")
        rmtree(partial_copy, ignore_errors=True)
        left_out = ignore_patterns("unfinished", "*.partial")  # the other run may still be there
        made = [name for name in stages if (other.folder / name / "stage.json").is_file()]
        for name in made:
            copytree(other.folder / name, partial_copy / name, ignore=left_out)
        for name in ("lists.json", "environment.json"):
            write_json(partial_copy / name, read_json(other.folder / name))
        records = read_records(other.folder / "metrics.jsonl")
        lines = [f"{json.dumps(r)}\n" for r in records if r.get("stage") in made]
        write_text(partial_copy / "metrics.jsonl", "".join(lines))
        settings = job.config.model_dump(mode="json")
        write_text(partial_copy / "config.yaml", yaml.safe_dump(settings))
        partial_copy.rename(job.folder)
        return


def is_done(job: Job) -> bool:
    """Tell whether a run has all its results, of these settings; its test score comes last."""
    file = job.folder / "results.json"
    if not file.is_file() or not _is_of(job):
        return False
    return job.config.dataset.test is None or "test" in read_json(file)


def _is_of(job: Job) -> bool:
    """Tell whether a run folder was made with the settings that are planned for it.

    Where it was not, train.py says what differs.
    """
    kept = read_kept(job.folder)
    return kept.dataset == job.config.dataset and not differing_keys(kept, job.config)


def refuse_changed_lists(jobs: Sequence[Job], folder: Path) -> None:
    """Compare the lists of a study's images with those of its earlier sittings.

    Args:
        jobs: of the study.
        folder: of the study; keeps the sha256 of each list as ``lists.json``.

    Raises:
        UserError: a list has changed since.
    """
    sections = {(job.config.dataset.root, *_names(job.config)) for job in jobs}
    files = {Path(root) / name for root, *names in sections for name in names}
    now = {str(file): sha256(file) for file in sorted(files) if file.is_file()}
    kept = folder / "lists.json"
    then = read_json(kept) if kept.is_file() else {}
    for file in now:
        if then.get(file, now[file]) != now[file]:
            raise UserError(
                f"{file}: has changed since the study in {folder} began, whose runs would be of "
                "two lists; restore it, or set name=... for another study"
            )
    write_json(kept, {**then, **now})


def _names(config: Config) -> list[str]:
    """Return the names of the lists that a config reads; published ones do not change."""
    section = config.dataset
    own = [] if section.split else [section.labeled, section.unlabeled, section.val]
    return [*own, *([] if section.test is None else [section.test])]


def refuse_shared_folders(jobs: Sequence[Job]) -> None:
    """Refuse a study two runs of which would work in one folder.

    Raises:
        UserError: names their rows.
    """
    rows: dict[Path, str] = {}
    for job in jobs:
        other, row = rows.setdefault(job.folder, ""), job.row.title
        if other:
            raise UserError(
                f"--methods, --seeds: '{other}' and '{row}' would both work in {job.folder}; "
                "leave one out"
            )
        rows[job.folder] = row


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
    """Lay out the results in Markdown, a row a method.

    mIoU of the kept checkpoint on val, its difference to the best supervised row, what the best
    epoch on val would have been, and mIoU on ``dataset.test``; Dice by group on both, where runs
    have it; what students start from; labeled and unlabeled crops that they saw; seconds; settings
    that were tried. Means and sample standard deviations; differences are between runs of one seed
    and labeled list. A paragraph below names means that are not over all classes, and stages that
    ``evaluate.patience`` ended.
    """
    results: dict[Row, dict[tuple[int, int], dict[str, Any]]] = defaultdict(dict)
    for job in jobs:
        results[job.row][job.draw] = read_results(job.folder)
    starts = {job.row: _start(job.config) for job in jobs}
    mious = {
        row: {draw: 100 * found["miou"] for draw, found in runs.items()}
        for row, runs in results.items()
    }
    supervised = [row for row in mious if row.method == "supervised"]
    best = max(supervised, key=lambda row: statistics.mean(mious[row].values()), default=None)
    against = "-" if best is None else f"against {best.title}"
    counts = ("labeled crops", "unlabeled crops", "seconds", "tried")
    dice = _group_dice(results)
    head = ("method", "mIoU", against, "best on val", "test", *dice, "start", *counts)
    lines = [head, ("---", *["---:"] * (4 + len(dice)), "---", *["---:"] * 4)]
    for row, runs in results.items():
        differences = [mious[row][draw] - mious[best][draw] for draw in runs] if best else []
        stages = [list(found["stages"].values()) for found in runs.values()]
        highest = [100 * run[-1]["best_miou"] for run in stages if "best_miou" in run[-1]]
        tests = [100 * found["test"]["miou"] for found in runs.values() if "test" in found]
        crops = (
            statistics.mean(sum(stage.get(f"{name}_crops", 0) for stage in run) for run in stages)
            for name in ("labeled", "unlabeled")
        )
        seconds = statistics.mean(sum(stage["seconds"] for stage in run) for run in stages)
        lines.append(
            (
                row.title,
                mean_and_spread([*mious[row].values()]),
                "" if row == best or not best else mean_and_spread(differences, "+"),
                mean_and_spread(highest) if highest else "",
                mean_and_spread(tests) if tests else "",
                *(column[row] for column in dice.values()),
                starts[row],
                *(f"{count:.0f}" for count in crops),
                f"{seconds:.0f}",
                str(row.tried),
            )
        )
    rows = [f"| {' | '.join(cells)} |" for cells in lines]
    remarks = _remarks([found for runs in results.values() for found in runs.values()])
    return "\n".join([*rows, "", " ".join(remarks)] if remarks else rows)


def _remarks(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name means that are not over all classes, and stages that ``evaluate.patience`` ended."""
    means = {describe_mean(found.get("per_class_iou", {})) for found in results}
    stops = [
        f"{found['name']}, {stage}: {stop}."
        for found in results
        for stage, made in found["stages"].items()
        if (stop := describe_stop(made))
    ]
    return [*(f"mIoU {few}." for few in sorted(means - {None})), *stops]


def _group_dice(results: Mapping[Row, Mapping[Any, dict[str, Any]]]) -> dict[str, dict[Row, str]]:
    """Return columns of Dice by group on val and test by their titles; none where no run has it."""
    columns: dict[str, dict[Row, str]] = {}
    for title, place in (("Dice by group", None), ("test Dice by group", "test")):
        found = {
            row: [run if place is None else run.get(place, {}) for run in runs.values()]
            for row, runs in results.items()
        }
        values = {
            row: [100 * report["by_group"]["dice"] for report in reports if "by_group" in report]
            for row, reports in found.items()
        }
        if any(values.values()):
            columns[title] = {row: mean_and_spread(v) if v else "" for row, v in values.items()}
    return columns


def _start(config: Config) -> str:
    """Return what the students of a run start from."""
    if 6 not in config.stages:
        return "encoder"
    return {"teacher": "stage 1", "encoder": "encoder"}[config.retrain.start]


def report(jobs: Sequence[Job], command: str) -> str:
    """Return the table with its title, command, machine and date."""
    config = jobs[0].config
    seeds, lists = (sorted({job.draw[part] for job in jobs}) for part in (0, 1))
    environments = [defaultdict(lambda: "unknown", read_environment(job.folder)) for job in jobs]
    machines = {
        f"{made['machine']}, {made['cores']} cores, {made['threads']} threads a run, "
        f"{made['device']}, {made['precision']}, torch {made['torch']}"
        for made in environments
    }
    commits = {str(made["commit"])[:7] for made in environments}
    kind, labeled = config.dataset.kind, config.dataset.split or config.dataset.labeled
    drawn = f" and {len(lists) - 1} more of its size, drawn at random" if len(lists) > 1 else ""
    each = f" with each of {len(lists)} lists" if len(lists) > 1 else ""
    return (
        f"## {Path(config.outdir).name.removesuffix('_study')}\n\n"
        f"`{command}`\n\n{table(jobs)}\n\n"
        f"Data `{kind}`, labeled `{labeled}`{drawn}. Mean ± standard deviation over seeds "
        f"{', '.join(map(str, seeds))}{each}; differences are of equal seeds and lists. mIoU "
        f"of the {config.evaluate.checkpoint} checkpoint in %; 'best on val' is the best of the "
        "epochs of the last stage that were validated, picked by val itself. Seconds are of all "
        f"stages, shared ones too. {'; '.join(sorted(machines))}. "
        f"Commit {', '.join(sorted(commits))}, {datetime.now(timezone.utc):%Y-%m-%d}.\n"
    )


def _list_of(kind: type, text: str) -> list[Any]:
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"'{text}': give numbers with commas between them") from None


def _stop(number: int, _: object) -> NoReturn:
    raise Stopped(number)


def main() -> None:
    """Read the command line, do the runs, print and write the table."""
    parser = Parser(prog="python -m utils.study", description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, here or in configs/")
    parser.add_argument(
        "--methods",
        required=True,
        help=f"some of {','.join(METHODS)},ladder with commas between them, and settings of one "
        "method after spaces, without spaces in their values; tried=N says how many were tried",
    )
    parser.add_argument("--seeds", default="0,1,2", help="numbers with commas between them")
    parser.add_argument(
        "--lists", type=int, default=1, help="number of labeled lists: the config's, and drawn ones"
    )
    parser.add_argument("--processes", type=int, default=1, help="runs at once")
    parser.add_argument("--write", type=Path, help="a Markdown file, such as docs/results.md")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for every run")
    arguments = parser.parse_intermixed_args()
    # Not at commas of stages=[1,2,6].
    methods = re.split(r",(?![^\[{]*[\]}])", arguments.methods)
    seeds = _list_of(int, arguments.seeds)
    for name in ("processes", "lists"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name}: {getattr(arguments, name)} is below 1; take a larger one")
    draws = list(product(seeds, range(arguments.lists)))
    jobs = plan(arguments.config, read_rows(methods), draws, arguments.settings)
    refuse_shared_folders(jobs)
    folder = Path(jobs[0].config.outdir)
    study = folder.name.removesuffix("_study")
    if arguments.write is not None:
        refuse_outputs([Output("--write", arguments.write, [".md", ".markdown"])], {})
        check_section(arguments.write, study)
    with lock_folder(folder, patience=0):
        for number in range(1, arguments.lists):
            draw_lists(jobs[0].config, number, folder / "lists" / str(number))
        refuse_changed_lists(jobs, folder)
        before = signal.signal(signal.SIGTERM, _stop)
        try:
            work(jobs, arguments.processes)
        finally:
            signal.signal(signal.SIGTERM, before)
        text = report(jobs, f"python -m utils.study {shlex.join(sys.argv[1:])}")
        print(text)
        write_text(folder / "study.md", text)
        if arguments.write is not None:
            put_section(arguments.write, study, text)


if __name__ == "__main__":
    exit_with_one_line(main)
