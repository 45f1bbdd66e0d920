"""Teacher and votes together: by hand."""

from types import SimpleNamespace

import pytest
import torch

from model.cisc.calibration import Exponents
from model.cisc.pseudo_labels import PseudoLabeler, Teacher, adjust, combine, prior_of_labels
from model.cisc.votes import as_prior
from utils.config.schema import LossSection
from utils.diagnosis import describe_votes


def test_bayes_rule_multiplies_probabilities_and_likelihood_ratios():
    probability = torch.tensor([0.8, 0.2]).view(1, 2, 1, 1)
    ratio = torch.tensor([0.3 / 0.9, 0.7 / 0.1]).view(1, 2, 1, 1)
    both = combine(probability.log(), ratio.log(), Exponents(1.0, 1.0)).flatten()
    assert (both[0] / both[1]).item() == pytest.approx((0.8 / 0.2) * (0.3 / 0.9) / (0.7 / 0.1))
    half = combine(probability.log(), ratio.log(), Exponents(2.0, 0.5)).flatten()
    expected = (0.8 / 0.2) ** 2 * ((0.3 / 0.9) / (0.7 / 0.1)) ** 0.5
    assert (half[0] / half[1]).item() == pytest.approx(expected)
    silent = combine(probability.log(), ratio.log(), Exponents())
    torch.testing.assert_close(silent, probability)


def test_adjustment_divides_the_prior_out():
    prior = torch.tensor([0.9, 0.09, 0.01])
    probability = torch.rand(2, 3, 4, 5).softmax(dim=1)
    expected = probability.double() / prior.double().sqrt().view(-1, 1, 1)
    expected /= expected.sum(dim=1, keepdim=True)
    torch.testing.assert_close(adjust(probability, prior, 0.5), expected.float())
    assert adjust(probability, prior, 0.0) is probability
    certain = torch.full((1, 3, 1, 1), 1 / 3)  # without evidence, all classes alike at 1
    torch.testing.assert_close(adjust(prior.view(1, 3, 1, 1), prior, 1.0), certain)


def test_labels_are_made_for_the_classes_that_the_loss_weighs():
    shares = torch.tensor([0.9, 0.08, 0.02])
    assert torch.equal(prior_of_labels(shares, LossSection()), as_prior(shares))
    weighted = prior_of_labels(shares, LossSection(class_weights=[1.0, 10.0, 5.0]))
    torch.testing.assert_close(weighted, torch.tensor([0.9, 0.8, 0.1]) / 1.8)
    balanced = prior_of_labels(shares, LossSection(class_weights="balanced"))
    torch.testing.assert_close(balanced, torch.full((3,), 1 / 3))
    half = torch.tensor([0.5, 0.5, 0.0])
    absent = prior_of_labels(torch.tensor([0.9, 0.1, 0.0]), LossSection(class_weights="balanced"))
    torch.testing.assert_close(absent, as_prior(half))  # a class without labels stays unlikely
    nothing = prior_of_labels(shares, LossSection(class_weights=[1.0, 11.25, 0.0]))
    torch.testing.assert_close(nothing, as_prior(half))


class BalancedTeacher(Teacher):
    """Has learnt all classes as equally frequent, and is as sure of each."""

    prior = torch.full((3,), 1 / 3)

    def __init__(self):
        pass

    def __call__(self, images, size):
        return torch.full((1, 3, *size), 1 / 3)


class SilentVoter:
    shares = torch.tensor([0.9, 0.08, 0.02])

    def judge(self, images, size):
        return torch.zeros(1, 3, *size), None, None


@pytest.mark.parametrize(
    ("weights", "expected"), [("balanced", [1 / 3] * 3), (None, [0.9, 0.08, 0.02])]
)
def test_votes_leave_the_weights_of_the_loss_in_the_labels(weights, expected):
    labeler = object.__new__(PseudoLabeler)
    loss = LossSection(class_weights=weights)
    labeler.config = SimpleNamespace(loss=loss, pseudo_label=SimpleNamespace(adjustment=0))
    labeler._teacher, labeler.voter = BalancedTeacher(), SilentVoter()
    labeler._exponents = Exponents(1.0, 1.0)
    both = labeler(torch.zeros(1, 3, 2, 2), (2, 2)).both[0, :, 0, 0]
    torch.testing.assert_close(both, torch.tensor(expected))


def test_the_log_says_what_votes_do():
    fit = {"teacher": 0.9, "votes": 0.4, "cross_entropy": 0.4, "cross_entropy_alone": 0.5}
    fit |= {"gain": 0.1, "error": 0.01, "miou": 0.6, "miou_alone": 0.5}
    used = describe_votes({"factor": 2.0, "teacher": 0.9, "votes": 0.4, "fit": fit})
    assert "enlarged 2 times" in used
    assert "mIoU 50.0 -> 60.0" in used
    silent = describe_votes({"factor": 2.0, "teacher": 1.0, "votes": 0.0, "fit": fit})
    assert silent.startswith("votes do not help and are left out")
    assert "too few labeled images" in describe_votes({"factor": 2.0, "teacher": 1.0, "votes": 0.5})
