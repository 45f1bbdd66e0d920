"""Whole runs, as a user types them, on a tiny demo set."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import same
from PIL import Image

import train
from dataset.catalog import dataset_info
from dataset.lists import read_label, read_splits
from dataset.query import Querier, QueryRule, build_query_index
from dataset.reading import read_image, to_input, to_label
from eval import evaluate
from model import Segmenter, fitting, network_of
from model.cisc import pseudo_labels
from model.cisc import votes as voting
from model.cisc.pseudo_labels import FoldTeacher
from model.cisc.votes import cut_patches
from utils import IMAGENET, checkpoint
from utils.checkpoint import load
from utils.config.reading import read_config
from utils.device import Device
from utils.errors import UserError
from utils.evaluation import ConfusionMatrix
from utils.files import write_json
from utils.run.folder import STAGES as FOLDERS
from utils.run.stages import Run

STAGES = ["1_supervised", "2_pseudo_label", "3_select", "4_retrain", "5_relabel", "6_retrain"]
FITTED = ["1_fold_1", "1_fold_2", "2_votes", "5_votes"]  # only where labeled patches vote


def weights(folder):
    return torch.load(folder / "checkpoint.pth", weights_only=True)["model"]


def outcome(run):
    """All that a run computed: final weights, masks, lists, index, scores."""
    files = sorted(run.glob("[1-6]_*/**/*.*"))
    kept = {
        str(file.relative_to(run)): file.read_bytes()
        for file in files
        if file.suffix in (".png", ".txt", ".csv") or file.name == "query_index.json"
    }
    return kept, weights(run / "6_retrain")


def start(overrides, name, **settings):
    words = [*overrides, f"name={name}", *(f"{key}={value}" for key, value in settings.items())]
    config = read_config("demo.yaml", words)
    train.train(config)
    return Path(config.outdir) / name


def train_until(monkeypatch, config, event, shall_stop):
    """Train until ``Progress`` has an event at which it shall stop, and interrupt it there."""
    original = getattr(fitting.Progress, event)

    def interrupted(self, *report):
        original(self, *report)
        if shall_stop(self):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(fitting.Progress, event, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.train(config)


@pytest.mark.parametrize("deterministic", [True, False])
def test_convolutions_add_in_a_fixed_order_unless_the_config_frees_them(
    demo_overrides, monkeypatch, deterministic
):
    def look(*_):
        assert torch.backends.cudnn.deterministic is deterministic
        assert not torch.backends.cudnn.benchmark
        raise UserError("seen")

    monkeypatch.setattr(train, "train_supervised", look)
    with pytest.raises(UserError, match="seen"):
        start(demo_overrides, "order", deterministic=deterministic)


@pytest.mark.slow
def test_six_stages_leave_what_the_design_names(finished, demo_root):
    run, printed = finished
    for name in ("config.yaml", "environment.json", "log.txt", "examples.png", "tensorboard"):
        assert (run / name).exists()
    results = json.loads((run / "results.json").read_text())
    assert results["name"] == "whole"
    assert list(results["stages"]) == sorted([*STAGES, *FITTED], key=FOLDERS.index)
    assert results["miou"] == results["stages"]["6_retrain"]["miou"]
    known = [value for value in results["per_class_iou"].values() if value is not None]
    assert results["miou"] == pytest.approx(np.mean(known))
    assert all(report["seconds"] >= 0 for report in results["stages"].values())
    epochs = [json.loads(line)["stage"] for line in (run / "metrics.jsonl").open()]
    whole = [name for name in epochs if name in STAGES]
    assert whole == [name for name in STAGES if name[0] in "146" for _ in range(2)]
    assert {*epochs} - {*STAGES} == {"1_fold_1", "1_fold_2"}
    for name in (*STAGES, *FITTED):
        assert name in printed
    assert "mIoU (last)" in printed


@pytest.mark.slow
def test_halves_and_masks_fit_together(finished, demo_root):
    run, _ = finished
    unlabeled = (demo_root / "unlabeled.txt").read_text().split()
    reliable = (run / "3_select" / "reliable.txt").read_text().split()
    unreliable = (run / "3_select" / "unreliable.txt").read_text().split()
    assert len(reliable) == 5
    assert sorted(reliable + unreliable) == sorted(unlabeled)
    for name, images in (("2_pseudo_label", unlabeled), ("5_relabel", unreliable)):
        masks = [(run / name / "masks" / image).with_suffix(".png") for image in images]
        assert sorted((run / name / "masks").rglob("*.png")) == sorted(masks)
        for mask in masks:
            with Image.open(mask) as picture:
                assert picture.mode == "P"
                assert picture.size == (64, 48)


def test_labeled_images_vote_for_their_own_labels(demo_root, tmp_path, tiny_settings):
    model = "model={backbone: timm/tf_efficientnet_lite0, output_stride: 32, pretrained: auto}"
    words = [*tiny_settings(demo_root, tmp_path), model]
    labeled = read_splits(read_config("demo.yaml", words).dataset).labeled

    config = read_config("demo.yaml", words)
    (both,) = cut_patches(config, Device("cpu", "fp32"), labeled, [6])
    right = []
    for sample in labeled:
        image, label = to_input(read_image(sample.image), IMAGENET), to_label(read_label(sample))
        told, features, _ = both.judge(image.unsqueeze(0), tuple(label.shape))
        assert torch.equal(both.features(image.unsqueeze(0)), features)
        (found,) = (told + both.memories[0].patches.prior().log().view(1, -1, 1, 1)).argmax(dim=1)
        right.append((found == label)[label != 255].float().mean())
        (most, share), (_, less) = both.voters_of(image.unsqueeze(0), 2)
        assert most == sample  # its own patches are the nearest
        assert 1 > share > less > 0
    assert torch.stack(right).mean() > 0.8  # patches are 5 pixels wide


def test_what_judges_a_fold_knows_nothing_of_its_labels(
    demo_root, tmp_path, tiny_settings, monkeypatch
):
    model = "model={backbone: timm/tf_efficientnet_lite0, output_stride: 32, pretrained: auto}"
    words = [*tiny_settings(demo_root, tmp_path), model, "pseudo_label.neighbour_scales=[6]"]
    config, seen = read_config("demo.yaml", words), []
    labeled, teacher = read_splits(config.dataset).labeled, tmp_path / "teacher"
    (voter,) = cut_patches(config, Device("cpu", "fp32"), labeled, [6])
    weights = network_of(config.model, 7, pretrained=None).state_dict()
    checkpoint.save(teacher / "checkpoint.pth", {"model": weights, "class_pixels": [1] * 7})

    def prior_of(shares, _):
        seen.append(shares)
        return torch.full((7,), 1 / 7)

    monkeypatch.setattr(pseudo_labels, "prior_of_labels", prior_of)
    with Run(config) as run:
        teachers = [FoldTeacher(teacher, labeled[:3])]
        run.stage("2_votes", pseudo_labels.fit_votes, labeled, teachers)
    assert [*map(torch.Tensor.tolist, seen)] == [voter.without(labeled[:3]).shares.tolist()]
    assert seen[0].tolist() != voter.shares.tolist()


@pytest.mark.slow
def test_stage_5_labels_with_what_is_left_of_the_votes(
    demo_root, tmp_path, tiny_settings, monkeypatch
):
    believed, labelers = {"factor": 6.0, "teacher": 0.5, "votes": 1.0}, []

    def believe(stage, labeled, teachers):
        write_json(stage.folder / "votes.json", believed)
        return believed

    class Spy(pseudo_labels.PseudoLabeler):
        def __init__(self, config, device, checkpoint, labeled, votes):
            labelers.append((checkpoint.parent.name, votes.name))
            super().__init__(config, device, checkpoint, labeled, votes)

    monkeypatch.setattr(train, "fit_votes", believe)
    monkeypatch.setattr(train, "PseudoLabeler", Spy)
    monkeypatch.setattr(pseudo_labels, "fit_learnt", lambda first, ratio, later: 0.6)
    run = start(tiny_settings(demo_root, tmp_path), "left")
    assert labelers == [("1_supervised", "2_votes"), ("4_retrain", "5_votes")]
    assert json.loads((run / "5_votes" / "votes.json").read_text())["votes"] == pytest.approx(0.7)
    assert "learnt 0.60 of the votes: their exponent is 0.70" in (run / "log.txt").read_text()


def test_which_patches_vote_does_not_depend_on_the_batch_size(
    demo_root, tmp_path, tiny_settings, monkeypatch
):
    monkeypatch.setattr(voting, "PATCHES", 30)
    model = "model={backbone: timm/tf_efficientnet_lite0, output_stride: 32, pretrained: auto}"
    kept = []
    for size in (1, 4):
        words = [*tiny_settings(demo_root, tmp_path), model, f"inference.batch_size={size}"]
        config = read_config("demo.yaml", words)
        labeled = read_splits(config.dataset).labeled
        ((memory,),) = (
            x.memories for x in cut_patches(config, Device("cpu", "fp32"), labeled, [6])
        )
        kept.append(memory.patches)
    assert torch.equal(kept[0].image, kept[1].image)
    assert torch.equal(kept[0].shares, kept[1].shares)
    assert set(kept[0].image.bincount().tolist()) == {5}  # of 30, and six images


@pytest.mark.slow
def test_a_finished_run_is_not_done_again(finished, demo_root, tiny_settings):
    run, _ = finished
    made = [*run.rglob("checkpoint.pth"), *(run / "val").rglob("*.*")]
    before = {file: file.stat().st_mtime_ns for file in made}
    train.train(read_config("demo.yaml", [*tiny_settings(demo_root, run.parent), "name=whole"]))
    assert {file: file.stat().st_mtime_ns for file in made} == before


@pytest.mark.slow
def test_other_settings_are_refused_with_the_keys(finished, demo_root, tiny_settings):
    run, _ = finished
    words = [*tiny_settings(demo_root, run.parent), "name=whole", "select.keep=0.75"]
    refused = r"its stages used select\.keep=0\.5; restore that, set name="
    with pytest.raises(UserError, match=refused):
        train.train(read_config("demo.yaml", words))


@pytest.mark.exhaustive
def test_weights_depend_on_no_loader(finished, demo_root, tmp_path, tiny_settings):
    words = tiny_settings(demo_root, tmp_path)
    again = start(words, "again", workers=2, cache="ram")
    masks, final = outcome(again)
    expected_masks, expected = outcome(finished[0])
    assert masks == expected_masks
    assert same(final, expected)


@pytest.mark.slow
def test_masks_of_unlabeled_images_are_never_opened(finished, demo_root, tmp_path, tiny_settings):
    """The list names masks that are garbage, and one that is absent: the run comes out the same."""
    root = tmp_path / "poisoned"
    shutil.copytree(demo_root, root)
    images = (root / "unlabeled.txt").read_text().split()
    lines = [f"{image} {image.replace('JPEGImages', 'poison')}" for image in images]
    (root / "unlabeled.txt").write_text("\n".join(lines))
    (root / "poison").mkdir()
    for image in images[1:]:
        (root / image.replace("JPEGImages", "poison")).write_bytes(b"not a picture")
    again = start(tiny_settings(root, tmp_path), "again")
    masks, final = outcome(again)
    expected_masks, expected = outcome(finished[0])
    assert masks == expected_masks
    assert same(final, expected)


@pytest.mark.slow
def test_the_index_of_the_paper_names_labeled_images_only(demo_root, tmp_path, tiny_settings):
    words = [*tiny_settings(demo_root, tmp_path), "supervised.epochs=1", "retrain.epochs=1"]
    config = read_config("demo.yaml", [*words, "name=paper"], "cisc")
    train.train(config)
    labeled = {line.split()[0] for line in (demo_root / "labeled.txt").read_text().splitlines()}
    index = json.loads((tmp_path / "paper" / "3_select" / "query_index.json").read_text())
    rule = QueryRule.of(config.query, dataset_info(config.dataset))
    full = build_query_index(read_splits(config.dataset).labeled, rule)
    classes = dataset_info(config.dataset).classes
    assert "background" not in index
    for name, images in index.items():
        everything = full[classes.index(name)]
        assert set(images) <= set(everything) <= labeled
        assert len(images) == -(-len(everything) // 2)


@pytest.mark.exhaustive
def test_what_a_method_does_not_use_is_not_there(finished, monkeypatch, demo_root, tiny_settings):
    """Under ``cisc_patch`` nothing is queried, and no labeled image is scored."""
    run, _ = finished
    assert not (run / "3_select" / "query_index.json").exists()
    assert not (run / "3_select" / "labeled_scores.csv").exists()
    monkeypatch.setattr(Querier, "draw", None)
    monkeypatch.setattr(train, "build_query_index", None)
    words = [*tiny_settings(demo_root, run.parent), "name=unqueried", "supervised.epochs=1"]
    train.train(read_config("demo.yaml", [*words, "retrain.epochs=1"]))


@pytest.mark.slow
def test_the_log_says_what_each_network_starts_from(finished):
    run, _ = finished
    lines = [line.partition(": ")[2] for line in (run / "log.txt").read_text().splitlines()]
    starts = [line for line in lines if "; images: mean 0." in line]
    assert any(f"all weights of {run}/1_supervised/checkpoint.pth" in line for line in starts)
    assert any(f"all weights of {run}/4_retrain/checkpoint.pth" in line for line in starts)


@pytest.mark.slow
def test_a_list_of_test_images_is_scored_once_at_the_end(finished, demo_root):
    run, _ = finished
    results, file = json.loads((run / "results.json").read_text()), demo_root / "test.txt"
    assert results["test"]["miou"] != results["miou"]
    words = [f"dataset.val={file}", "dataset.test=null"]
    net = Segmenter.load(
        run / "6_retrain" / "checkpoint.pth", [*words, f"dataset.root={demo_root}"]
    )
    assert evaluate(net) == results["test"]
    log = (run / "log.txt").read_text()
    assert f"test: {100 * results['test']['miou']:.2f} % mIoU" in log
    assert results["stages"]["6_retrain"]["best_miou"] >= results["miou"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "workers"),
    [("1_supervised", 0), pytest.param("6_retrain", 2, marks=pytest.mark.exhaustive)],
)
def test_an_interrupted_stage_goes_on_to_the_same_weights(
    finished, demo_root, tmp_path, tiny_settings, monkeypatch, stage, workers
):
    words = [*tiny_settings(demo_root, tmp_path), f"workers={workers}", "name=cut"]
    config = read_config("demo.yaml", words)
    train_until(monkeypatch, config, "epoch_done", lambda at: at._stage.name == stage)
    train.train(config)
    masks, final = outcome(tmp_path / "cut")
    expected_masks, expected = outcome(finished[0])
    assert masks == expected_masks
    assert same(final, expected)
    assert not list((tmp_path / "cut").rglob("unfinished"))


@pytest.mark.slow
def test_from_stage_does_later_stages_again(finished, demo_root, tmp_path, tiny_settings):
    shutil.copytree(finished[0], tmp_path / "whole")
    kept = (tmp_path / "whole" / "2_pseudo_label" / "stage.json").stat().st_mtime_ns
    expected = outcome(finished[0])
    config = read_config("demo.yaml", [*tiny_settings(demo_root, tmp_path), "name=whole"])
    train.train(config, from_stage=6)
    assert (tmp_path / "whole" / "2_pseudo_label" / "stage.json").stat().st_mtime_ns == kept
    assert same(outcome(tmp_path / "whole")[1], expected[1])
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == (finished[0] / "metrics.jsonl").read_text().count("\n")  # none twice


@pytest.mark.slow
@pytest.mark.parametrize("method", ["st++", "cisc"])
def test_methods_of_six_stages(demo_root, tmp_path, tiny_settings, method):
    words = [*tiny_settings(demo_root, tmp_path), "supervised.epochs=1", "retrain.epochs=1"]
    train.train(read_config("demo.yaml", [*words, f"name={method}"], method))
    run = tmp_path / method
    assert list(json.loads((run / "results.json").read_text())["stages"]) == STAGES
    assert len(list((run / "1_supervised").glob("earlier_*.pth"))) == 2 * (method == "st++")
    rows = (run / "3_select" / "unlabeled_scores.csv").read_text().split()[1:]
    scores = [float(row.split(",")[1]) for row in rows]
    assert all(0 <= score <= 2 if method == "st++" else score <= 0 for score in scores)


@pytest.mark.exhaustive
def test_baselines_are_switches(demo_root, tmp_path, tiny_settings):
    """Without rectification and consistency the terms are those of plain self-training."""
    words = [*tiny_settings(demo_root, tmp_path), "supervised.consistency=0"]
    words += ["retrain.weight=ones", "evaluate={checkpoint: best, every: 1}"]
    changes = {"ohem.min_kept": 500, "loss.dice": 0.5, "supervised.accumulate": 2}
    changes["dataset.groups"] = r"\d(?=\.jpg)"
    run = start(words, "plain", **changes)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert "consistency" not in lines[0]
    assert all(line["weight"] == 1.0 for line in lines if line["stage"] == "6_retrain")
    scores = [line["miou"] for line in lines if line["stage"] == "6_retrain"]
    results = json.loads((run / "results.json").read_text())
    assert results["miou"] == max(scores)
    assert results["test"]["by_group"]["groups"] == results["by_group"]["groups"] == 4
    assert results["by_group"]["dice"] in [line.get("dice_by_group") for line in lines]
    assert results["dice"] == results["stages"]["6_retrain"]["dice"]
    assert "mIoU (best)" in (run / "log.txt").read_text()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "model",
    [
        "model.backbone=timm/convnext_tiny",
        "model.backbone=timm/mobilenetv3_large_100",
        "model={name: dpt, backbone: timm/vit_tiny_patch16_224}",
    ],
)
def test_encoders_of_timm_go_through_the_six_stages(demo_root, tmp_path, tiny_settings, model):
    words = [*tiny_settings(demo_root, tmp_path), model, "retrain.epochs=1", "supervised.epochs=1"]
    run = start(words, "encoder")
    saved = torch.load(run / "6_retrain" / "checkpoint.pth", weights_only=True)
    assert saved["preprocessing"]["interpolation"] == "bicubic"
    stages = json.loads((run / "results.json").read_text())["stages"]
    assert list(stages) == sorted([*STAGES, *FITTED], key=FOLDERS.index)


@pytest.mark.exhaustive
def test_the_running_average_and_the_counted_classes_resume_to_the_same_bits(
    demo_root, tmp_path, tiny_settings, monkeypatch
):
    words = [*tiny_settings(demo_root, tmp_path), "retrain.threshold=0.2", "checkpoint_every=1"]
    config = read_config("demo.yaml", [*words, "name=whole"], "unimatch")
    train.train(config)
    cut, steps = read_config("demo.yaml", [*words, "name=cut"], "unimatch"), iter(range(1, 99))
    # 6 iterations in stage 1, 4 in stage 6
    train_until(monkeypatch, cut, "step_done", lambda _: next(steps) == 7)
    train.train(cut)
    whole, again = (weights(tmp_path / name / "6_retrain") for name in ("whole", "cut"))
    assert same(whole, again)
    files = (tmp_path / name / "6_retrain" / "checkpoint.pth" for name in ("whole", "cut"))
    pixels, resumed = (load(file)["class_pixels"] for file in files)
    assert pixels == resumed
    assert sum(pixels) > 0
    assert not (tmp_path / "whole" / "2_pseudo_label").exists()


def test_balanced_class_weights_are_counted_from_the_labeled_masks(demo_overrides):
    config = read_config("demo.yaml", [*demo_overrides, "loss.class_weights=balanced"])
    labeled, said = read_splits(config.dataset).labeled, []
    log = SimpleNamespace(say=said.append)
    stage = SimpleNamespace(config=config, device=Device("cpu", "fp32"), name="1", log=log)
    losses = train._losses(stage, labeled)
    weights = losses.class_weights.numpy()
    labels = np.concatenate([np.asarray(read_label(sample)).ravel() for sample in labeled])
    counts = np.bincount(labels[labels != 255], minlength=7)
    shown = counts > 0
    equal = counts.sum() / shown.sum()
    np.testing.assert_allclose(weights[shown] * counts[shown], equal, rtol=1e-5)
    assert said[0].startswith(f"1: class weights {dataset_info(config.dataset).classes[0]} ")
    rarest = np.where(shown, counts, counts.max()).argmin()
    logits, ids, alike = torch.zeros(1, 7, 1, 1), torch.tensor([[[rarest]]]), torch.ones(1, 1, 1)
    assert weights[rarest] > 1.5
    assert losses.labeled(logits, ids) == pytest.approx(weights[rarest] * np.log(7))
    assert losses.pseudo(logits, ids, alike) == pytest.approx(np.log(7))  # made for the weights


def test_images_without_a_group_are_refused_before_anything_starts(demo_overrides):
    config = read_config("demo.yaml", [*demo_overrides, "dataset.groups=patient"])
    with pytest.raises(UserError, match=r"^dataset\.groups: 'patient' finds no group in the name"):
        train.train(config)
    assert not Path(config.outdir, config.name).exists()


def test_class_weights_are_one_a_class(demo_overrides):
    config = read_config("demo.yaml", [*demo_overrides, "loss.class_weights=[1, 2]"])
    with pytest.raises(UserError, match=r"loss\.class_weights: 2 numbers for 7 classes; give one"):
        train.train(config)
    assert not Path(config.outdir, config.name).exists()


@pytest.fixture
def validations(monkeypatch):
    """Take the mIoU of each epoch from a list, as if validation had found it."""

    def script(mious):
        def validated(stage, net, val):
            kept = stage.folder.parent / "metrics.jsonl"
            epoch = len(kept.read_text().splitlines()) if kept.is_file() else 0
            counts = torch.tensor([[round(100 * mious[epoch]), 100 - round(100 * mious[epoch])]])
            matrix = ConfusionMatrix(7)
            matrix.counts[0, :2] = counts
            return matrix

        monkeypatch.setattr(fitting, "_validate", validated)

    return script


MIOUS = [0.4, 0.6, 0.5, 0.6, 0.8, 0.1, 0.9, 0.2]
PATIENT = [
    *("stages=[1]", "supervised={epochs: 8, batch_size: 4, repeat_below: 0}", "evaluate.every=1"),
    *("panels.images=0", "dataset.test=null", "augment.crop_size=32"),
]


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_patience_ends_a_stage_and_every_table_says_so(
    demo_overrides, tmp_path, validations, monkeypatch, checkpoint
):
    """The third epoch and the fourth are not above the second: 0.6 is no better than 0.6."""
    validations(MIOUS)
    monkeypatch.setattr(train, "_keep_predictions", lambda *_: None)
    words = [*demo_overrides, *PATIENT, f"evaluate.checkpoint={checkpoint}"]
    whole = read_config("demo.yaml", [*words, "evaluate.patience=2", "name=whole"])
    train.train(whole)
    run = Path(whole.outdir) / "whole"
    report = json.loads((run / "results.json").read_text())["stages"]["1_supervised"]
    assert (report["iterations"], report["planned_iterations"]) == (4, 8)
    assert report["labeled_crops"] == 4 * 8
    assert (report["epoch"], report["best_epoch"]) == ((4, 2) if checkpoint == "last" else (2, 2))
    log = (run / "log.txt").read_text()
    assert "1_supervised: stopped after epoch 4 of 8: no better mIoU on val in 2 validations" in log
    assert "1_supervised: stopped early at 4 of 8 iterations, by val" in log
    rates = [json.loads(line)["lr"] for line in (run / "metrics.jsonl").open()]
    assert len(rates) == 4
    assert rates[-1] > rates[0] / 2  # of the whole length: (1 - 4/8) ** 0.9

    for epoch in (3, 4):  # in the middle of the wait, and when it is over
        cut = read_config("demo.yaml", [*words, "evaluate.patience=2", f"name=cut{epoch}"])
        train_until(monkeypatch, cut, "epoch_done", lambda at, epoch=epoch: at.epoch == epoch)
        train.train(cut)
        again = Path(cut.outdir) / f"cut{epoch}"
        assert same(weights(again / "1_supervised"), weights(run / "1_supervised"))
        found = (json.loads((x / "results.json").read_text()) for x in (run, again))
        one, other = (x["stages"]["1_supervised"] for x in found)
        ignored = {"seconds", "images_per_second"}
        assert {k: v for k, v in one.items() if k not in ignored} == {
            k: v for k, v in other.items() if k not in ignored
        }
        assert "stopped after epoch 4 of 8" in (again / "log.txt").read_text()


def test_a_patience_that_can_end_nothing_says_so(demo_overrides, validations, monkeypatch):
    validations(MIOUS)
    monkeypatch.setattr(train, "_keep_predictions", lambda *_: None)
    words = [*demo_overrides, *PATIENT, "supervised.epochs=2", "evaluate.patience=1"]
    config = read_config("demo.yaml", words)
    train.train(config)
    log = (Path(config.outdir) / config.name / "log.txt").read_text()
    assert "stopped" not in log
    assert (
        "1_supervised: evaluate.patience=1 cannot end this stage early: it has 2 epochs and "
        "evaluate.every=1; lower one of the two" in log
    )


def test_validation_makes_no_copy_of_the_network(demo_overrides, monkeypatch):
    config, given = read_config("demo.yaml", demo_overrides), []
    stage = SimpleNamespace(config=config, device=Device("cpu", "fp32"))
    net = train.network_of(config.model, 7, pretrained=None).train()
    monkeypatch.setattr(fitting, "validate", lambda predict, *_, **__: given.append(predict.net))
    fitting._validate(stage, net, read_splits(config.dataset).val)
    assert given[0] is net
    assert not net.training
