"""Votes of labeled patches: by hand, and against a float64 reference."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from model.cisc import votes as voting
from model.cisc.votes import LabeledPatches, Memory, PatchVoter
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
    for patch, share, number in zip(*drawn[:3], strict=True):  # each is a place of its image
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


def test_votes_that_equal_the_prior_tell_nothing():
    prior = torch.tensor([0.9, 0.08, 0.02])
    told = voting.log_ratio(prior.view(1, 3, 1, 1), prior)
    torch.testing.assert_close(told, torch.zeros(1, 3, 1, 1))
    votes = torch.tensor([0.0, 0.2, 0.8]).view(1, 3, 1, 1)
    expected = torch.tensor([0.05, 0.95 * 2.5 + 0.05, 0.95 * 40 + 0.05]).log()
    torch.testing.assert_close(voting.log_ratio(votes, prior).flatten(), expected)


def test_patches_of_images_are_left_out():
    patches = LabeledPatches(torch.eye(3), torch.eye(3), torch.tensor([4, 7, 4]))
    left = patches.without(torch.tensor([4, 5]))
    assert left.image.tolist() == [7]
    assert left.features.tolist() == [[0.0, 1.0, 0.0]]
    assert left.shares.tolist() == [[0.0, 1.0, 0.0]]
    assert patches.without(torch.tensor([], dtype=torch.long)).image.tolist() == [4, 7, 4]


def test_principal_components_keep_the_votes():
    """512 numbers that lie in 40 directions, and a little beside them."""
    torch.manual_seed(0)
    directions = torch.randn(40, 512)
    rows = torch.randn(600, 40) @ directions + 0.01 * torch.randn(600, 512)
    shares = torch.rand(600, 3).softmax(dim=1)
    whole = LabeledPatches(torch.nn.functional.normalize(rows, dim=1), shares, torch.arange(600))
    few = whole.project()
    assert few.features.shape == (600, 256)
    torch.testing.assert_close(few.basis.T @ few.basis, torch.eye(256), rtol=0, atol=1e-5)
    maps = (torch.randn(30, 40) @ directions).T.view(1, 512, 5, 6)
    votes = [voting.neighbour_votes(maps, patches) for patches in (whole, few)]
    torch.testing.assert_close(*votes, rtol=0, atol=1e-3)
    assert few.without(torch.arange(500)).basis is few.basis
    assert few.project() is few  # once


def test_images_are_named_by_their_share_of_the_votes():
    patches = LabeledPatches(torch.eye(2), torch.eye(2), torch.tensor([3, 1]))
    features = torch.tensor([[4.0, 1.0], [3.0, 0.0]]).view(1, 2, 1, 2)  # places (4, 3), (1, 0)
    shares = voting.voting_images(features, patches)
    odds = math.exp(0.2 / 0.05)
    first = (odds / (1 + odds) + 1) / 2  # the second place asks patch 0 alone, nearly
    assert shares[3].item() == pytest.approx(first, abs=1e-6)
    assert shares.sum().item() == pytest.approx(1)
    assert shares[[0, 2]].tolist() == [0, 0]


def test_encoders_have_a_say_alike():
    """Two encoders whose one place is nearest to other patches: the mean of what both tell."""
    shares = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    patches = LabeledPatches(torch.eye(3), shares, torch.tensor([0, 1, 1]))
    sees = [torch.tensor([1.0, 0, 0]), torch.tensor([0.6, 0.8, 0])]
    memories = [
        Memory(lambda _, factor, seen=seen: factor * seen.view(1, 3, 1, 1), patches)
        for seen in sees
    ]
    told = PatchVoter(memories, 2.0, ["a", "b"]).judge(torch.zeros(1, 3, 8, 8), (4, 6))
    alone = [
        voting.log_ratio(voting.neighbour_votes(seen.view(1, 3, 1, 1), patches), patches.prior())
        for seen in sees
    ]
    torch.testing.assert_close(told.by_patch, (alone[0] + alone[1]) / 2)
    torch.testing.assert_close(told.log_ratio, told.by_patch.expand(1, 2, 4, 6))
    assert told.features.tolist() == [[2.0, 0.0, 0.0]]  # the first one's
    voter = PatchVoter(memories, 1.0, ["a", "b"])
    (first, most), (second, least) = voter.voters_of(torch.zeros(1, 3, 8, 8), 2)
    assert (first, second) == ("a", "b")
    odds = math.exp(0.2 / 0.05)  # the first encoder asks "a" alone, the second one "b", nearly
    assert most == pytest.approx((1 + 1 / (1 + odds)) / 2, abs=1e-4)
    assert least == pytest.approx((odds / (1 + odds)) / 2, abs=1e-4)
    assert voter.without(["b"]).memories[1].patches.image.tolist() == [0]
    assert voter.without(["a", "b"]).is_empty
    assert not voter.is_empty


def test_maps_of_other_strides_are_resized_to_the_first_ones():
    patches = LabeledPatches(torch.eye(2), torch.eye(2), torch.tensor([0, 1]))
    coarse = torch.tensor([[[[1.0]], [[0.0]]]])
    fine = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    memories = [Memory(lambda *_, maps=maps: maps, patches) for maps in (fine, coarse)]
    told = PatchVoter(memories, 1.0, []).judge(torch.zeros(1, 3, 8, 8), (1, 2))
    sure = voting.log_ratio(torch.tensor([[1.0, 0.0]]), patches.prior())[0]
    assert told.by_patch.shape == (1, 2, 1, 2)
    torch.testing.assert_close(told.by_patch[0, :, 0, 0], sure, atol=1e-4, rtol=0)
    torch.testing.assert_close(told.by_patch[0, :, 0, 1], sure.mean().expand(2), atol=1e-4, rtol=0)
