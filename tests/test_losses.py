"""The formulas of docs/method.md and the losses, against definitions and numbers by hand."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from model.cisc import maps as cisc
from model.losses import (
    balanced_weights,
    cross_entropy,
    dice_loss,
    ohem_cross_entropy,
    rectified_cross_entropy,
    rectified_dice_loss,
    scale_weights,
)
from tests.benchmarks.plain import pool, similarity
from utils import IGNORE


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator)
    label = torch.randint(0, 3, (2, 4, 5), generator=generator)
    label[0, 0] = IGNORE
    return logits, label, torch.rand(2, 4, 5, generator=generator)


def test_rectified_matches_hand_count():
    logits = torch.zeros(1, 2, 1, 3)  # every pixel costs log 2
    pseudo_label = torch.tensor([[[0, 1, IGNORE]]])
    weight = torch.tensor([[[1.0, 0.5, 1.0]]])
    loss = rectified_cross_entropy(logits, pseudo_label, weight)
    assert loss.item() == pytest.approx(1.5 * math.log(2) / 2)


def test_weight_one_is_cross_entropy_is_torchs_mean_over_valid_pixels(batch):
    logits, label, weight = batch
    expected = F.cross_entropy(logits, label, ignore_index=IGNORE)
    torch.testing.assert_close(cross_entropy(logits, label), expected)
    ours = rectified_cross_entropy(logits, label, torch.ones_like(weight))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("loss", [cross_entropy, ohem_cross_entropy, dice_loss])
def test_no_valid_pixel_costs_nothing(loss, batch):
    logits = batch[0].requires_grad_()
    cost = loss(logits, torch.full((2, 4, 5), IGNORE))
    cost.backward()
    assert cost.item() == 0
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize(("min_kept", "kept"), [(1, (0.6, 0.2)), (3, (0.6, 0.2, 0.8))])
def test_ohem_keeps_pixels_under_the_threshold_and_the_hardest(min_kept, kept):
    p = torch.tensor([0.9, 0.6, 0.2, 0.8])  # of the true class, 0 of 2
    logits, label = torch.stack([p, 1 - p]).log()[None, :, None], torch.zeros(1, 1, 4).long()
    loss = ohem_cross_entropy(logits, label, threshold=0.7, min_kept=min_kept)
    assert loss.item() == pytest.approx(-sum(map(math.log, kept)) / len(kept), rel=1e-5)


def test_losses_are_float32_under_autocast(batch):
    logits, label, weight = batch
    with torch.autocast("cpu", torch.bfloat16):
        assert rectified_cross_entropy(logits.bfloat16(), label, weight).dtype == torch.float32
        dice = rectified_dice_loss(logits.bfloat16(), label, weight)
        assert torch.equal(dice, rectified_dice_loss(logits.bfloat16().float(), label, weight))


def test_class_weights_match_hand_count():
    logits = torch.zeros(1, 2, 1, 3)  # every pixel costs log 2
    label, weights = torch.tensor([[[0, 1, IGNORE]]]), torch.tensor([0.5, 4.0])
    loss = cross_entropy(logits, label, class_weights=weights)
    assert loss.item() == pytest.approx(4.5 * math.log(2) / 2)


def test_balanced_weights_match_hand_count_and_average_to_one():
    assert balanced_weights([60, 30, 10]) == pytest.approx([100 / 180, 100 / 90, 100 / 30])
    assert balanced_weights([75, 25, 0]) == pytest.approx([100 / 150, 2.0, 1.0])
    assert balanced_weights([0, 0]) == [1.0, 1.0]


def test_weights_are_scaled_to_a_mean_of_one_over_the_pixels():
    assert scale_weights([1.0, 3.0, 8.0], [50, 50, 0]) == pytest.approx([0.5, 1.5, 4.0])
    assert scale_weights([0.0, 0.0, 5.0], [90, 8, 0]) == [0.0, 0.0, 5.0]


def test_dice_matches_hand_count():
    p = torch.tensor([[0.9, 0.6, 0.2, 0.5]])  # of class 0; class 2 is shown nowhere
    logits = torch.stack([p, (1 - p) / 2, (1 - p) / 2], dim=1).log()[:, :, None]
    label = torch.tensor([[[0, 0, 1, IGNORE]]])
    zero = 1 - 2 * (0.9 + 0.6) / (0.9**2 + 0.6**2 + 0.2**2 + 2)
    one = 1 - 2 * 0.4 / (0.05**2 + 0.2**2 + 0.4**2 + 1)
    assert dice_loss(logits, label).item() == pytest.approx((zero + one) / 2)
    weight = torch.tensor([[[1.0, 0.5, 0.0, 1.0]]])  # the pixel of class 1 does not count
    zero = 1 - 2 * (0.9 + 0.3) / (0.9**2 + 0.5 * 0.6**2 + 1.5)
    loss = rectified_dice_loss(logits, label, weight)
    assert loss.item() == pytest.approx(0.5 * zero)  # the mean weight of three valid pixels


def naive_dice(logits, label, weight):
    """The definition, image by image and class by class, in float64."""
    total, valid = 0.0, 0
    for scores, ids, weights in zip(logits.double(), label, weight.double(), strict=True):
        kept = ids != IGNORE
        p, ids, w = scores.softmax(0)[:, kept], ids[kept], weights[kept]
        costs = []
        for number in ids.unique():
            true = (ids == number).double()
            both = (w * p[number] * true).sum()
            costs.append(1 - 2 * both / ((w * p[number] ** 2).sum() + (w * true).sum()))
        valid += int(kept.sum())
        total += w.sum() * torch.stack(costs).mean() if costs else 0
    return total / valid


def test_dice_equals_the_definition_in_float64(batch):
    logits, label, weight = batch
    expected = naive_dice(logits, label, weight)
    assert rectified_dice_loss(logits, label, weight).item() == pytest.approx(expected.item())
    expected = naive_dice(logits, label, torch.ones_like(weight))
    assert dice_loss(logits, label).item() == pytest.approx(expected.item())


def test_dice_of_a_perfect_prediction_is_zero_and_of_a_wrong_one_one(batch):
    label = batch[1]
    perfect = 60 * F.one_hot(label.where(label != IGNORE, 0), 3).permute(0, 3, 1, 2).float()
    assert dice_loss(perfect, label).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss(perfect.roll(1, dims=1), label).item() == pytest.approx(1)


@pytest.mark.parametrize("loss", [cross_entropy, rectified_cross_entropy, rectified_dice_loss])
def test_parts_of_a_batch_add_up(batch, loss):
    """Whatever share of the valid pixels a part has."""
    logits, label, weight = batch
    maps = (logits, label) if loss is cross_entropy else (logits, label, weight)
    if loss is cross_entropy:
        loss = partial(loss, class_weights=torch.tensor([0.3, 1.0, 5.0]))
    pixels = (label != IGNORE).sum()
    parts = [loss(*part, pixels) for part in zip(*(each.split(1) for each in maps), strict=True)]
    torch.testing.assert_close(sum(parts), loss(*maps))


@pytest.mark.parametrize("weights", [0.0, 1e-30, 1.0])
def test_dice_has_a_finite_gradient(batch, weights):
    logits, label, weight = batch
    logits = (logits * 100).requires_grad_()  # probabilities of 0 and 1
    label[1] = IGNORE
    rectified_dice_loss(logits, label, torch.full_like(weight, weights)).backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[label.unsqueeze(1).expand_as(logits) == IGNORE].abs().max() == 0


def test_ignored_pixels_do_not_change_dice(batch):
    logits, label, _ = batch
    other = torch.where(label.unsqueeze(1) == IGNORE, 7 * logits.flip(1), logits)
    assert not torch.equal(other, logits)
    torch.testing.assert_close(dice_loss(other, label), dice_loss(logits, label))


def naive_entropy(probability, region, label):
    """Binary cross entropy over the valid pixels of one image, by the definition."""
    total, count = 0.0, 0
    for p, m, y in zip(probability.flatten(), region.flatten(), label.flatten(), strict=True):
        if y != IGNORE:
            total -= math.log(p) if m else math.log(1 - p)
            count += 1
    return total / count


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(3)
    features = torch.rand(2, 8, 5, 7, generator=generator, dtype=torch.float64)
    query = torch.rand(2, 8, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 2, 17, 26), generator=generator)
    labels[:, :, :2] = IGNORE
    return features, query, labels[0], labels[1], torch.tensor([1, 2])


def test_pooling_of_a_resized_map_matches_hand_count():
    # A line of two, resized to four: 1, 1.5, 2.5, 3 (weights 1, 3/4, 1/4, 0); the last two count.
    features = torch.tensor([[[[1.0, 3.0]]]])
    mask = torch.tensor([[[False, False, True, True]]])
    assert cisc.masked_average_pooling(features, mask).item() == pytest.approx(
        5.5 / 2.0005, abs=1e-6
    )


@pytest.mark.parametrize("size", [(17, 26), (5, 7), (4, 3), (81, 81)])
def test_adjoint_pooling_and_its_gradient_are_those_of_resized_features(size):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 16, 5, 7, generator=generator).requires_grad_()
    mask = torch.rand(3, *size, generator=generator) < 0.3
    pooled, expected = cisc.masked_average_pooling(features, mask), pool(features, mask)
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5)
    slopes = [torch.autograd.grad(p.square().sum(), features)[0] for p in (pooled, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)


def test_prototype_of_an_empty_region_is_zero_and_its_map_too():
    features = torch.rand(1, 4, 3, 3)
    prototype = cisc.masked_average_pooling(features, torch.zeros(1, 6, 6, dtype=torch.bool))
    assert prototype.abs().max() == 0
    assert cisc.similarity_map(features, prototype, (6, 6)).abs().max() == 0


def test_similarity_matches_hand_count_and_definition(pair):
    features = torch.tensor([[[[3.0, -1.0, 0.0]], [[4.0, 0.0, 2.0]]]])  # (3, 4), (-1, 0), (0, 2)
    shown = cisc.similarity_map(features, torch.tensor([[5.0, 0.0]]), (1, 3))
    torch.testing.assert_close(shown, torch.tensor([[[0.6, 0.0, 0.0]]]))
    features, query, *_ = pair
    expected = similarity(features, query[:, :, 0, 0], (17, 26))
    torch.testing.assert_close(cisc.similarity_map(features, query[:, :, 0, 0], (17, 26)), expected)


def test_similarity_is_float32_and_bounded_under_autocast():
    features = torch.randn(2, 64, 9, 9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        shown = cisc.similarity_map(features, features[:, :, 4, 4], (33, 33))
    assert shown.dtype == torch.float32
    assert 0 <= shown.min() <= shown.max() <= 1


def test_consistency_equals_the_definition(pair):
    features, query, label, query_label, shared = pair
    expected = 0.0
    for i in range(2):
        one, other = slice(i, i + 1), shared[i]
        region, query_region = label[one] == other, query_label[one] == other
        maps = similarity(features[one], pool(query[one], query_region), (17, 26))
        back = similarity(query[one], pool(features[one], region), (17, 26))
        expected += naive_entropy(maps, region, label[one]) / 2
        expected += naive_entropy(back, query_region, query_label[one]) / 2
    ours = cisc.consistency_loss(features, query, label, query_label, shared)
    assert ours.item() == pytest.approx(expected, rel=1e-9)


def test_pairs_that_share_nothing_do_not_count(pair):
    features, query, label, query_label, shared = pair
    alone = cisc.consistency_loss(features[:1], query[:1], label[:1], query_label[:1], shared[:1])
    beside = cisc.consistency_loss(features, query, label, query_label, torch.tensor([1, IGNORE]))
    torch.testing.assert_close(alone, beside)
    nothing = torch.tensor([IGNORE, IGNORE])
    assert cisc.consistency_loss(features, query, label, query_label, nothing) == 0


def test_consistency_gradient_is_finite_where_a_cosine_is_zero_or_one():
    features = torch.zeros(1, 2, 2, 2)
    features[:, 0, 0] = 1.0  # the upper half along one axis, the lower along the other
    features[:, 1, 1] = 1.0
    features.requires_grad_()
    label = torch.tensor([[[0, 0], [1, 1]]])
    loss = cisc.consistency_loss(features, features, label, 1 - label, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss, features)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def test_rectification_weight_matches_hand_count():
    region = torch.tensor([[[True, True, False, False]]])
    cisc_map = torch.tensor([[[1.0, 0.25, 0.25, 1.0]]], requires_grad=True)
    weight = cisc.rectification_weight(region, cisc_map)
    torch.testing.assert_close(weight, torch.tensor([[[1.0, 0.25, 0.75, 0.0]]]))
    assert not weight.requires_grad


def test_cross_image_weight_equals_the_definition_and_is_one_without_a_query(pair):
    features, query, label, query_label, _ = pair
    shared = torch.tensor([IGNORE, 2])
    prototype = pool(query, query_label == 2)
    weight = cisc.cross_image_weight(features, prototype, label, shared)
    assert (weight[0] == 1).all()
    region = label[1:] == 2
    cisc_map = similarity(features[1:], prototype[1:], (17, 26))
    torch.testing.assert_close(weight[1:], 1 - (region.double() - cisc_map).abs())


def test_class_prototypes_are_pooling_class_by_class(pair):
    features, _, label, *_ = pair
    prototypes, present = cisc.class_prototypes(features, label, 4)
    for class_id in range(3):
        expected = pool(features, label == class_id)
        torch.testing.assert_close(prototypes[:, class_id], expected)
    assert present.tolist() == [[True, True, True, False]] * 2
    assert prototypes[:, 3].abs().max() == 0


def test_reliability_equals_the_definition(pair):
    features, query, label, *_ = pair
    anchors = query[0, :, 0, :4].T.clone()
    anchors[1] = torch.nan  # a class that no labeled image shows
    scores = cisc.reliability(features, label, anchors)
    for i in range(2):
        for class_id in (0, 2):
            shown = similarity(features[i : i + 1], anchors[class_id][None], (17, 26))
            expected = naive_entropy(shown, label[i] == class_id, label[i])
            assert scores[i, class_id].item() == pytest.approx(-expected, rel=1e-9)
    assert scores[:, [1, 3]].isnan().all()  # no anchor; class absent


def test_image_reliability_sums_or_averages_the_classes_that_count():
    nan = torch.nan
    scores = torch.tensor([[-1.0, nan, -3.0], [-2.5, nan, nan], [nan, nan, nan]])
    assert cisc.image_reliability(scores, average=False).tolist() == [-4.0, -2.5, -torch.inf]
    assert cisc.image_reliability(scores, average=True).tolist() == [-2.0, -2.5, -torch.inf]
