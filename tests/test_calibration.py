"""How far votes are trusted: exponents by hand, by float64 and by what is known to be best."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataset.lists import Sample
from dataset.loader import RandomStreams
from model.cisc.calibration import (
    FOLDS,
    Exponents,
    HeldOut,
    draw_folds,
    fit_exponents,
    fit_learnt,
)
from utils.scores import group_of


def opinions(evidence: float, label: torch.Tensor) -> torch.Tensor:
    """Draw log ratios of Gaussian observations, which tell so much of the label."""
    return evidence * (torch.randn(len(label), 4) + evidence * F.one_hot(label, 4))


@pytest.fixture
def pixels():
    torch.manual_seed(0)
    label, image = torch.randint(0, 4, (20_000,)), torch.arange(20_000) % 20
    own = opinions(1.5, label)
    return HeldOut(own, opinions(1.0, label), own.argmax(dim=1), label, image)


def test_independent_opinions_that_are_calibrated_get_exponents_of_one(pixels):
    fit = fit_exponents(pixels)
    assert fit.exponents.teacher == pytest.approx(1, abs=0.03)
    assert fit.exponents.votes == pytest.approx(1, abs=0.03)
    assert fit.helps
    sure = fit_exponents(pixels._replace(teacher=2 * pixels.teacher, votes=pixels.votes / 4))
    assert sure.exponents.teacher == pytest.approx(fit.exponents.teacher / 2, rel=1e-3)
    assert sure.exponents.votes == pytest.approx(fit.exponents.votes * 4, rel=1e-3)
    assert sure.cross_entropy == pytest.approx(fit.cross_entropy, abs=1e-6)


def test_the_fit_has_the_least_cross_entropy(pixels):
    few = HeldOut(*(column[:500] for column in pixels))

    def loss(teacher, votes):
        scores = teacher * few.teacher.double() + votes * few.votes.double()
        return F.cross_entropy(scores, few.label).item()

    fit = fit_exponents(few)
    (a, b), least = fit.exponents, fit.cross_entropy
    assert least == pytest.approx(loss(a, b), abs=1e-9)
    around = [(x, y) for x in (-0.02, 0, 0.02) for y in (-0.02, 0, 0.02) if x or y]
    assert all(loss(a + x, b + y) > least for x, y in around)
    assert fit.cross_entropy_alone == pytest.approx(
        min(loss(x / 1000, 0) for x in range(500, 1500)), abs=1e-6
    )


@pytest.mark.parametrize("votes", ["noise", "against"])
def test_votes_that_tell_nothing_or_the_wrong_are_silent(pixels, votes):
    wrong = torch.randn_like(pixels.votes) if votes == "noise" else -pixels.votes
    fit = fit_exponents(pixels._replace(votes=wrong))
    assert fit.exponents.votes < 0.02
    assert not fit.helps
    assert fit.miou_alone == pytest.approx(fit_exponents(pixels).miou_alone)


def test_a_teacher_that_tells_nothing_is_left_out(pixels):
    fit = fit_exponents(pixels._replace(teacher=-pixels.teacher))
    assert fit.exponents.teacher == 0
    assert fit.exponents.votes == pytest.approx(1, abs=0.05)


def test_votes_that_repeat_the_teacher_are_silent(pixels):
    """Bayes' rule would count the same evidence twice."""
    noisy = pixels.teacher + 0.5 * torch.randn_like(pixels.teacher)
    fit = fit_exponents(pixels._replace(votes=noisy))
    assert fit.exponents.votes < 0.05
    assert fit.exponents.teacher > 0.9


def test_a_gain_on_one_image_alone_is_not_believed(pixels):
    alone = torch.where((pixels.image == 3).unsqueeze(1), 4 * pixels.votes, 0.0)
    fit = fit_exponents(pixels._replace(votes=alone))
    assert fit.gain > 0
    assert not fit.helps
    one = fit_exponents(pixels._replace(image=torch.zeros_like(pixels.image)))
    assert one.gain > 0
    assert not one.helps  # there is no spread to compare with


def test_votes_are_compared_with_the_labels_that_the_teacher_writes_without_them(pixels):
    """Its own, not those with the prior of the labels in place of its own."""
    assert fit_exponents(pixels._replace(alone=pixels.label)).miou_alone == 1
    assert not fit_exponents(pixels._replace(alone=pixels.label)).helps


def test_the_error_is_that_of_a_mean_over_images():
    """Two images of four pixels, by hand."""
    label, image = torch.tensor([0, 1, 0, 1] * 2), torch.tensor([0] * 4 + [1] * 4)
    own = F.one_hot(label, 2).float()
    own[1], own[5] = own[0], own[4]  # one pixel of each is wrong
    fit = fit_exponents(HeldOut(own, torch.zeros(8, 2), own.argmax(dim=1), label, image))
    # Probability 3 / 4 of the more probable class: exponent log 3.
    assert fit.exponents.teacher == pytest.approx(math.log(3), abs=1e-4)
    expected = -(3 * math.log(3 / 4) + math.log(1 / 4)) / 4
    assert fit.cross_entropy == pytest.approx(expected, abs=1e-9)
    assert (fit.gain, fit.error) == pytest.approx((0, 0), abs=1e-9)
    assert fit.miou == pytest.approx((2 / 3 + 1 / 2) / 2)


FRAMES = (r"patient\d+_frame\d+", r"(patient\d+)_frame\d+")


def sample(name: str) -> Sample:
    return Sample(name, Path(name), Path(name))


def test_folds_share_out_the_images_and_keep_groups_together():
    labeled = [sample(f"patient{n // 5}_z{n % 5}") for n in range(30)]
    folds = draw_folds(labeled, None, RandomStreams(0, "folds"))
    assert [len(fold) for fold in folds] == [30 // FOLDS] * FOLDS
    assert sorted(x.name for fold in folds for x in fold) == sorted(x.name for x in labeled)
    assert folds != draw_folds(labeled, None, RandomStreams(1, "folds"))
    grouped = draw_folds(labeled, r"patient\d+", RandomStreams(0, "folds"))
    groups = [{group_of(x.name, r"patient\d+") for x in fold} for fold in grouped]
    assert not set.intersection(*groups)
    assert sum(map(len, groups)) == 6
    volume, patient = (group_of("patient3_frame1_z2", x) for x in FRAMES)
    assert (volume, patient) == ("patient3_frame1", "patient3")
    either = [group_of(x, r"(patient\d+)_z|(subject\d+)_z") for x in ("patient3_z2", "subject1_z2")]
    assert either == ["patient3", "subject1"]
    assert draw_folds(labeled[:5], r"patient\d+", RandomStreams(0, "folds")) == []
    assert draw_folds(labeled[:1], None, RandomStreams(0, "folds")) == []


@pytest.mark.parametrize(("held", "learnt"), [(0.3, 0.3), (0.0, 0.0), (-0.5, 0.0)])
def test_what_a_teacher_has_learnt_of_votes_is_found(pixels, held, learnt):
    later = 0.7 * pixels.teacher + held * pixels.votes
    assert fit_learnt(pixels.teacher, pixels.votes, later) == pytest.approx(learnt, abs=1e-3)
    assert fit_learnt(pixels.teacher, pixels.votes, later.log_softmax(dim=1) - 3) == pytest.approx(
        learnt, abs=1e-3
    )


def test_a_better_teacher_needs_less_of_the_votes(pixels):
    """It has other evidence; what it shares with the votes is counted as learnt."""
    exponents = fit_exponents(pixels).exponents
    taught = exponents.teacher * pixels.teacher + exponents.votes * pixels.votes
    later = taught + opinions(1.0, pixels.label)
    left = exponents.votes - exponents.teacher * fit_learnt(pixels.teacher, pixels.votes, later)
    best = fit_exponents(pixels._replace(teacher=later)).exponents.votes
    assert abs(max(0, left) - best) < 0.1 < exponents.votes - best


def test_exponents_without_votes_leave_the_teacher_as_it_is():
    assert Exponents() == (1.0, 0.0)
    assert np.isfinite(Exponents()).all()
