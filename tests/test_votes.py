"""Votes of labeled patches: by hand, and against a float64 reference."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from model.cisc import votes as voting
from model.cisc.votes import LabeledPatches
from utils import IGNORE


def test_patches_hold_the_shares_of_their_labeled_pixels():
    features = torch.tensor([[[[3.0, 0.0]], [[4.0, 2.0]]]])  # (1, 2, 1, 2)
    label = torch.tensor([[[0, 1, 2, IGNORE], [0, IGNORE, IGNORE, IGNORE]]])
    cut = partial(voting.labeled_patches, num_classes=3, rng=np.random.default_rng(0))
    patches = cut(features, label, torch.tensor([7]), limit=9)
    # The right patch is ignored at three pixels of four, and left out.
    torch.testing.assert_close(patches.features, torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(patches.shares, torch.tensor([[2 / 3, 1 / 3, 0.0]]))
    assert patches.image.tolist() == [7]
    features, label = torch.randn(2, 2, 4, 5), torch.randint(0, 3, (2, 4, 5))
    drawn = cut(features, label, torch.arange(2), limit=6)
    assert len(drawn.features) == len(drawn.shares) == len(drawn.image) == 6
    for patch, share, number in zip(*drawn, strict=True):  # each is a place of its image
        own = torch.nn.functional.normalize(features[number], dim=0).flatten(1).T
        (place,) = (own - patch).abs().sum(dim=1).lt(1e-6).nonzero().flatten()
        assert share.argmax() == label[number].flatten()[place]


def test_nearer_patches_have_more_votes():
    patches = LabeledPatches(torch.eye(2), torch.eye(2), torch.arange(2))
    features = torch.tensor([4.0, 3.0]).view(1, 2, 1, 1)
    votes = voting.neighbour_votes(features, patches)
    odds = math.exp((0.8 - 0.6) / 0.05)
    assert votes[0, 0, 0, 0].item() == pytest.approx(odds / (1 + odds), abs=1e-6)
    torch.testing.assert_close(votes.sum(dim=1), torch.ones(1, 1, 1))


def test_thirty_neighbours_of_many_agree_with_float64():
    torch.manual_seed(0)
    rows, shares = torch.randn(500, 6), torch.rand(500, 3).softmax(dim=1)
    patches = LabeledPatches(torch.nn.functional.normalize(rows, dim=1), shares, None)
    features = torch.randn(2, 6, 4, 5)
    place = torch.nn.functional.normalize(features[1, :, 2, 3].double(), dim=0)
    cosines = patches.features.double() @ place
    nearest = cosines.argsort(descending=True)[:30]
    weight = (cosines[nearest] / 0.05).softmax(dim=0)
    expected = (weight.unsqueeze(1) * shares[nearest].double()).sum(dim=0)
    found = voting.neighbour_votes(features, patches)[1, :, 2, 3]
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


def test_pooling_counts_the_prior_once():
    probability = torch.tensor([0.8, 0.2]).view(1, 2, 1, 1)
    votes, prior = torch.tensor([0.3, 0.7]).view(1, 2, 1, 1), torch.tensor([0.9, 0.1])
    both = voting.combine(probability, votes, prior).flatten()
    assert (both[0] / both[1]).item() == pytest.approx((0.8 / 0.2) * (0.3 / 0.7) / (0.9 / 0.1))


def test_adjustment_divides_the_prior_out_of_what_is_pooled():
    prior = torch.tensor([0.9, 0.09, 0.01])
    votes, probability = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    votes, probability = (m / m.sum(dim=1, keepdim=True) for m in (votes, probability))
    both = voting.combine(probability, votes, prior).double()
    expected = both / prior.double().sqrt().view(-1, 1, 1)
    expected /= expected.sum(dim=1, keepdim=True)
    found = voting.combine(probability, votes, prior, adjustment=0.5)
    torch.testing.assert_close(found, expected.float())
    certain = torch.full((1, 3, 1, 1), 1 / 3)  # without evidence, all classes alike at 1
    known = prior.view(1, 3, 1, 1)
    torch.testing.assert_close(voting.combine(known, known, prior, adjustment=1.0), certain)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 3.0])
def test_votes_that_equal_the_prior_tell_nothing(exponent):
    prior = torch.tensor([0.9, 0.08, 0.02])
    votes = voting.sharpen(prior.view(1, 3, 1, 1), prior, exponent)
    torch.testing.assert_close(votes.flatten(), prior)
    probability = torch.tensor([0.5, 0.3, 0.2]).view(1, 3, 1, 1)
    torch.testing.assert_close(voting.combine(probability, votes, prior), probability)
    others = voting.sharpen(torch.tensor([0.2, 0.3, 0.5]).view(1, 3, 1, 1), prior, 0.0)
    torch.testing.assert_close(others.flatten(), prior)  # at exponent 0 all votes tell nothing


def test_exponents_fit_patches_of_other_images():
    torch.manual_seed(0)
    places, image, kind = torch.randn(4, 8), torch.arange(400) % 2, torch.arange(400) // 2 % 4
    features = torch.nn.functional.normalize(places[kind] + 0.01 * torch.randn(400, 8), dim=1)
    sure = torch.nn.functional.one_hot(kind, 4).float()
    fit = voting.calibrate(LabeledPatches(features, sure, image))
    assert fit.exponent == 3.0  # the other image has the same patches: the sharpest is the best
    unsure = voting.calibrate(LabeledPatches(features, sure[torch.randperm(400)], image))
    assert unsure.exponent < 0.5
    assert unsure.cross_entropy == pytest.approx(math.log(4), abs=0.01)
    own = LabeledPatches(features, sure, kind % 2)  # no class is in both images
    chance = pytest.approx(math.log(4), abs=1e-5)
    assert voting.calibrate(own) == (0.0, chance)  # no other image shows the class
    assert voting.calibrate(LabeledPatches(features, sure, torch.zeros(400))) == (1.0, math.inf)


def test_the_teachers_prior_is_divided_out_and_the_votes_prior_stays():
    """By hand: 0.5 * 0.2 / 0.25 against 0.5 * 0.8 / 0.75."""
    probability = torch.tensor([0.5, 0.5]).view(1, 2, 1, 1)
    prior, teacher_prior = torch.tensor([0.2, 0.8]), torch.tensor([0.25, 0.75])
    votes = prior.view(1, 2, 1, 1)  # tell nothing
    both = voting.combine(probability, votes, prior, teacher_prior).flatten()
    assert (both[0] / both[1]).item() == pytest.approx((0.2 / 0.25) / (0.8 / 0.75))
    same = voting.combine(probability, votes, prior, prior)
    torch.testing.assert_close(same, voting.combine(probability, votes, prior))


def test_images_are_named_by_their_share_of_the_votes():
    patches = LabeledPatches(torch.eye(2), torch.eye(2), torch.tensor([3, 1]))
    features = torch.tensor([[4.0, 1.0], [3.0, 0.0]]).view(1, 2, 1, 2)  # places (4, 3), (1, 0)
    shares = voting.voting_images(features, patches)
    odds = math.exp(0.2 / 0.05)
    first = (odds / (1 + odds) + 1) / 2  # the second place asks patch 0 alone, nearly
    assert shares[3].item() == pytest.approx(first, abs=1e-6)
    assert shares.sum().item() == pytest.approx(1)
    assert shares[[0, 2]].tolist() == [0, 0]
