"""The report of runs, as files and as a browser shows it."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import yaml
from conftest import refusal

import utils.report.__main__ as report_program
from utils.report.page import explain_diagnosis, page
from utils.report.reading import by_method, read_run

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.slow
DIAGNOSIS = {
    "truth": "truth.txt",
    "images": 10,
    "labels": {"2_pseudo_label": {"images": 10, "share": 0.9, "miou": 0.8, "pixel_accuracy": 0.95}},
    "classes": {
        name: {"miou": miou} for name, miou in (("teacher", 0.5), ("votes", 0.6), ("both", 0.7))
    },
    "weights": {
        name: {
            "auroc": 0.9,
            "calibration_error": 0.1,
            "weight_on_wrong": 0.2,
            "curve": [
                {"weight": 0.2, "right": 0.25, "share": 0.4},
                {"weight": 0.9, "right": 1.0, "share": 0.6},
            ],
        }
        for name in ("confidence", "probability by both")
    },
    "rank_correlation": 0.5,
}


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory):
    """A finished run with a diagnosis, whose classes have names that HTML would misread."""
    folder = tmp_path_factory.mktemp("report") / "whole"
    shutil.copytree(finished[0], folder)
    (folder / "diagnosis.json").write_text(json.dumps(DIAGNOSIS))
    kept = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(kept.replace("  threshold: 0.0", "  threshold: 0.6", 1))
    for table in folder.glob("val/*/confusion.csv"):
        table.write_text(
            table.read_text().replace("ball", "<b>$ball").replace("mug", "mug & 'cup'")
        )
    return folder


def text_of(content):
    """Return the words of a page, without tags."""
    return html.unescape(re.sub(r"<[^>]*>", " ", content))


def seeds_of(run, tmp_path, mious, **settings):
    """Copy a run for each seed, with another mIoU of its last stage, in percent."""
    for seed, miou in enumerate(mious):
        folder = tmp_path / f"{settings.get('name', 'cisc')}_{seed}"
        shutil.copytree(run, folder)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config |= {
            "seed": seed,
            "name": folder.name,
            "stages": settings.get("stages", config["stages"]),
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        last = [
            file for file in folder.glob("*/stage.json") if "miou" in json.loads(file.read_text())
        ]
        if settings.get("stages") == [1]:
            for file in folder.glob("[2-6]_*"):
                shutil.rmtree(file)
            last = [folder / "1_supervised" / "stage.json"]
        content = json.loads(max(last).read_text())
        max(last).write_text(json.dumps({**content, "miou": miou / 100}))
        yield folder


def test_the_page_answers_the_questions(run):
    results = json.loads((run / "results.json").read_text())
    first, last = (100 * results["stages"][name]["miou"] for name in ("1_supervised", "6_retrain"))
    content = page([read_run(run)])
    words = re.sub(r"\s+", " ", text_of(content))
    helped = "Yes" if last > first else "No"
    assert f"{helped}: mIoU went from {first:.1f} after 1_supervised to {last:.1f}" in words
    known = read_run(run).predictions
    one, other = (predictions.iou for predictions in (known[0], known[-1]))
    rose = sum(other - one > 0)
    assert f"{rose} of {np.isfinite(other - one).sum()} classes rose" in words
    before = {image.name: image.miou for image in known[0].images}
    fell = sum(image.miou < before[image.name] for image in known[-1].images)
    assert f"{fell} of 4 validation images have a lower mIoU than after stage 1" in words
    assert "those of the votes 60.0, and those of both 70.0" in words
    assert "What was left out is mostly wrong." in words
    assert "(40 % of the pixels" in words
    assert "25 % are right; of the others 100 %" in words
    assert "Rank correlation of the scores with the true mIoU of the pseudo labels: 0.50." in words
    for stage in ("4_retrain", "6_retrain"):
        assert f"Query panel of {stage}" in words
    assert content.count("<svg") == 4  # gains, reliability, histogram, curves
    assert content.count("wrong in red</small>") == 4  # 2 best, 2 worst
    assert "backbone: resnet18" in words
    assert len(content) < 3e6
    assert "<script" not in content
    assert not re.search(r"(src|href)=\"(?!data:|#)", content)
    assert "<b>$ball" not in content
    assert "<b>$ball" in words


def test_judgement_of_weights_by_hand(run):
    config = read_run(run).config
    rule = config.retrain.model_copy(update={"weight": "confidence"})
    told = explain_diagnosis(config.model_copy(update={"retrain": rule}), DIAGNOSIS)
    # Right pixels: 0.1 at weight 0.2, 0.6 at 0.9; wrong ones: 0.3 at 0.2.
    assert f"'confidence', is {(0.1 * 0.2 + 0.6 * 0.9) / 0.7:.2f} on right pixels" in told[-1]
    assert "0.20 on wrong ones" in told[-1]
    assert "in 90 % of pairs" in told[-1]


def test_what_is_missing_is_said(run, tmp_path):
    shutil.copytree(run, tmp_path / "less")
    for name in ("val", "4_retrain/panels", "6_retrain/panels"):
        shutil.rmtree(tmp_path / "less" / name)
    for name in ("diagnosis.json", "metrics.jsonl", "results.json", "environment.json"):
        (tmp_path / "less" / name).unlink()
    words = text_of(page([read_run(tmp_path / "less")]))
    assert f"python eval.py {tmp_path / 'less'} --diagnose LIST" in words
    assert "No query panels" in words
    assert "Not known: this needs the predictions of two stages" in words
    assert "this run folder has no predictions in val/" in words
    for file in (tmp_path / "less").glob("*/stage.json"):
        file.unlink()
    assert "no stage has ended; continue" in refusal(read_run, tmp_path / "less")
    assert "is no run folder" in refusal(read_run, tmp_path)


def test_pictures_whose_files_are_gone_are_left_out(run, tmp_path):
    shutil.copytree(run, tmp_path / "moved")
    for table in (tmp_path / "moved").glob("val/*/images.csv"):
        table.write_text(table.read_text().replace("JPEGImages/10", "elsewhere/10"))
    assert "wrong in red</small>" not in page([read_run(tmp_path / "moved")])


def test_runs_are_compared_over_seeds(run, tmp_path):
    folders = [*seeds_of(run, tmp_path, [50, 54, 52])]
    folders += seeds_of(run, tmp_path, [40, 41, 45], name="supervised", stages=[1])
    runs = [read_run(folder) for folder in folders]
    assert {name: len(members) for name, members in by_method(runs).items()} == {
        "cisc": 3,
        "supervised": 3,
    }
    words = re.sub(r"\s+", " ", text_of(page(runs)))
    assert "The best supervised runs are those of supervised: 42.0 mIoU." in words
    assert "Unlabeled images helped: cisc has 52.0, +10.0 points." in words
    assert "52.0 ± 2.0 +10.0 ± 3.0" in words  # differences 10, 13, 7
    assert "42.0 ± 2.6" in words


def test_stages_that_patience_ended_are_named(run, tmp_path):
    folders = list(seeds_of(run, tmp_path, [50, 54]))
    file = folders[0] / "6_retrain" / "stage.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "iterations": 3, "planned_iterations": 9}))
    stop = "stopped early at 3 of 9 iterations, by val"
    runs = [read_run(folder) for folder in folders]
    assert stop in text_of(page(runs[:1]))
    assert f"cisc_0, 6_retrain {stop}." in text_of(page(runs))
    assert "stopped early" not in text_of(page(runs[1:]))


def test_the_command_line(run, complaint, tmp_path, run_program):
    done = run_program("-m", "utils.report", run)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{run / 'report.html'}: open it in a browser\n"
    assert (run / "report.html").read_text().startswith("<!doctype html>")
    assert "--out: missing" in complaint(report_program, run, run)
    twice = complaint(report_program, run, run, "--out", tmp_path / "page.html")
    assert twice == f"error: {run}: is named twice; name it once"
    assert "is no run folder" in complaint(report_program, tmp_path)


MEASURE = """
<script>addEventListener("load", () => { top.document.title = JSON.stringify({
    inner: innerWidth, content: document.documentElement.scrollWidth,
    images: [...document.images].map(image => image.naturalWidth),
    paper: getComputedStyle(document.body).backgroundColor,
    tables: [...document.querySelectorAll("table")].filter(t => !t.closest(".scroll")).length,
}) })</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome")
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it(run, tmp_path, width, scheme):
    content = page([read_run(run)])
    inner = html.escape(content + MEASURE)
    place = tmp_path / "page.html"  # a window of its own is never narrower than 500 pixels
    frame = f'<iframe width="{width}" height="900" style="border: 0" srcdoc="{inner}"></iframe>'
    place.write_text(f"<!doctype html><title></title>{frame}", encoding="utf-8")
    dark = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", dark]
    command = [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", place.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))
    assert found["inner"] == width
    assert found["content"] <= width
    assert len(found["images"]) == content.count("<img") > 16
    assert min(found["images"]) > 0
    assert found["tables"] == 0
    shade = sum(map(int, re.findall(r"\d+", found["paper"])[:3])) / 3
    assert (shade < 128) == (scheme == "dark")


def test_the_newest_panel_is_shown(run):
    panels = run / "6_retrain" / "panels"
    names = {"epoch_990.png", "epoch_1000.png"}
    for name in names:
        (panels / name).touch()
    assert read_run(run).panels["6_retrain"] == panels / "epoch_1000.png"
    for name in names:
        (panels / name).unlink()
