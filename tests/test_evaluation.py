"""Predictions, their scores, and the meter of weight rules, on numbers checked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn

from utils import IMAGENET
from utils.config.schema import InferenceSection, WindowSection
from utils.device import Device
from utils.diagnosis import WeightQuality, rank_correlation
from utils.evaluation import ConfusionMatrix, Predictor, confusion_counts, lay_out_scores
from utils.scores import Groups

CPU = Device("cpu", "fp32")


def predictor(net, window=None, **settings):
    return Predictor(net, CPU, InferenceSection(window=window, **{"average_at": 1.0, **settings}))


class Pointwise(nn.Module):
    """Logits are the channels, times three; notes the shapes that it is given."""

    preprocessing = IMAGENET

    def __init__(self):
        super().__init__()
        self.shapes = []

    def extract(self, images):
        self.shapes.append(tuple(images.shape))
        return images

    def classify(self, features):
        return 3 * features


class Positional(Pointwise):
    """Logits also grow to the right, so that a mirrored image gives another answer."""

    def classify(self, features):
        ramp = torch.linspace(0, 1, features.shape[-1]).view(1, 1, 1, -1)
        weights = torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1, 1)
        return features + ramp * weights


def test_flip_averages_the_mirrored_answer_mirrored_back():
    images = torch.zeros(1, 3, 1, 5)
    predicted = predictor(Positional(), flip=True)(images, (1, 5))
    ramp = torch.linspace(0, 1, 5)
    logits = torch.outer(torch.tensor([0.0, 1.0, 2.0]), ramp)
    expected = (logits.softmax(0) + logits.flip(-1).softmax(0)) / 2
    torch.testing.assert_close(predicted[0, :, 0], expected)


def test_scales_average_and_keep_an_image_of_one_colour():
    images = torch.tensor([0.5, -1.0, 2.0]).view(1, 3, 1, 1).expand(1, 3, 5, 9)
    one = predictor(Pointwise())(images, (10, 18))
    many = predictor(Pointwise(), scales=[0.5, 1.0, 2.0])(images, (10, 18))
    torch.testing.assert_close(one, many, atol=1e-5, rtol=0)
    torch.testing.assert_close(many.sum(dim=1), torch.ones(1, 10, 18))


def test_a_view_is_resized_once_from_the_pixels_of_the_file():
    """At scale 2 of half its size an image is seen as it is in its file."""
    images = torch.randn(1, 3, 8, 12)
    own = predictor(Pointwise())(images, (8, 12))
    seen = predictor(Pointwise(), long_side=6, scales=[2.0])(images, (8, 12))
    assert torch.equal(own, seen)
    small = Pointwise()
    predictor(small, long_side=6)(images, (8, 12))
    assert small.shapes == [(1, 3, 4, 6)]


def test_views_of_a_smooth_image_may_meet_at_half_its_size():
    """What meets at (6, 9) is resized once; linear in between, so a ramp's class stays."""
    row = torch.linspace(-1, 1, 18)
    images = torch.stack([row, -row, 0 * row])[None, :, None].expand(1, 3, 12, 18)
    views = [predictor(Pointwise(), flip=True, average_at=share) for share in (1.0, 0.5)]
    exact, half = (predict(images, (12, 18)) for predict in views)
    assert half.shape == exact.shape
    assert (half - exact).abs().max() < 0.05
    assert torch.equal(half.argmax(dim=1), exact.argmax(dim=1))


def test_a_single_view_is_exact_wherever_several_meet():
    images = torch.randn(2, 3, 8, 9)
    predicted = predictor(Pointwise(), average_at=0.1)(images, (8, 9))
    torch.testing.assert_close(predicted, (3 * images).softmax(dim=1))
    assert predictor(Pointwise(), scales=[0.3])(images, (31, 17)).shape == (2, 3, 31, 17)


class PerImage(Pointwise):
    """Logits depend on the whole window: its mean is added to the first class."""

    def classify(self, features):
        logits = features.clone()
        logits[:, 0] += features.mean(dim=(1, 2, 3), keepdim=True)[:, 0]
        return logits


@pytest.mark.parametrize("weighting", ["uniform", "gaussian"])
@pytest.mark.parametrize("size", [(20, 31), (8, 40), (5, 9), (30, 8)])
def test_windows_do_not_change_a_pointwise_network(size, weighting):
    images = torch.randn(2, 3, *size)
    window = WindowSection.model_construct(size=8, step=0.4, weighting=weighting, batch_size=3)
    whole, cut = (predictor(Pointwise(), w)(images, size) for w in (None, window))
    torch.testing.assert_close(whole, cut)


def test_windows_at_the_edges_are_snapped_and_batched():
    net = Pointwise()
    window = WindowSection.model_construct(size=8, step=0.5, batch_size=4)
    predictor(net, window)(torch.randn(1, 3, 8, 21), (8, 21))
    assert net.shapes == [(4, 3, 8, 8), (1, 3, 8, 8)]  # from columns 0, 4, 8, 12 and 13
    both = Pointwise()
    predictor(both, window, flip=True)(torch.randn(3, 3, 8, 9), (8, 9))
    assert both.shapes == [(4, 3, 8, 8), (2, 3, 8, 8)] * 2  # two places of three images, mirrored
    small = Pointwise()
    predictor(small, window)(torch.randn(1, 3, 8, 7), (8, 7))
    assert small.shapes == [(1, 3, 8, 7)]  # fits one window: passed whole


def test_windows_overlap_as_the_mean_of_their_probabilities():
    images = torch.randn(1, 3, 4, 6)
    cut = predictor(PerImage(), WindowSection.model_construct(size=4, step=0.5))(images, (4, 6))
    left = predictor(PerImage())(images[..., :4], (4, 4))
    right = predictor(PerImage())(images[..., 2:], (4, 4))
    torch.testing.assert_close(cut[..., 2:4], (left[..., 2:] + right[..., :2]) / 2)
    torch.testing.assert_close(cut[..., :2], left[..., :2])


def matrix_of(num_classes, prediction, label):
    matrix = ConfusionMatrix(num_classes)
    matrix.update(torch.tensor(prediction), torch.tensor(label))
    return matrix


def test_iou_matches_hand_count():
    matrix = matrix_of(3, [[0, 0, 1, 1], [1, 1, 1, 0]], [[0, 0, 0, 1], [1, 1, 255, 255]])
    # Six pixels count. Class 0: 2 hits, 3 in label, 2 predicted. Class 1: 3 hits, 3 and 4.
    assert matrix.counts.tolist() == [[2, 1, 0], [0, 3, 0], [0, 0, 0]]
    assert matrix.iou()[:2].tolist() == pytest.approx([2 / 3, 3 / 4])
    assert math.isnan(matrix.iou()[2])
    assert matrix.mean_iou() == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert matrix.pixel_accuracy() == pytest.approx(5 / 6)


def test_a_class_that_is_only_predicted_counts_as_zero_and_none_at_all_is_nan():
    assert matrix_of(3, [0, 2], [0, 0]).mean_iou() == pytest.approx((1 / 2 + 0) / 2)
    nothing = matrix_of(2, [0, 1], [255, 255])
    assert math.isnan(nothing.mean_iou())
    assert math.isnan(nothing.pixel_accuracy())


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2, 3, 255])), min_size=1))
def test_matrix_is_a_plain_count_however_it_is_fed(pixels):
    once = matrix_of(4, *map(list, zip(*pixels, strict=True)))
    piecewise = ConfusionMatrix(4)
    for prediction, label in pixels:
        piecewise.update(torch.tensor([prediction]), torch.tensor([label], dtype=torch.uint8))
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for prediction, label in pixels:
        if label != 255:
            expected[label, prediction] += 1
    assert torch.equal(once.counts, expected)
    assert torch.equal(piecewise.counts, expected)


def test_images_of_a_batch_are_counted_apart_in_one_go():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 5, (3, 7, 6), generator=generator).byte()
    label[label == 4] = 255
    prediction = torch.randint(0, 4, (3, 7, 6), generator=generator)
    counts = confusion_counts(prediction, label, 4)
    for count, found, true in zip(counts, prediction, label, strict=True):
        expected = torch.zeros(4, 4, dtype=torch.int64)
        for pixel, truth in zip(found.flatten(), true.flatten(), strict=True):
            if truth != 255:
                expected[int(truth), int(pixel)] += 1
        assert torch.equal(count, expected)
    assert confusion_counts(prediction, torch.full_like(label, 255), 4).sum() == 0


def test_counts_stay_exact_beyond_float32():
    matrix = ConfusionMatrix(2)
    matrix.counts[0, 0] = 2**24
    matrix.update(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    assert matrix.counts[0, 0] == 2**24 + 1
    matrix.counts[0, 1] = 2**60
    assert matrix.iou()[0].item() == (2**24 + 1) / (2**24 + 1 + 2**60)


def test_quality_of_six_pixels():
    quality = WeightQuality()
    quality.update(
        torch.tensor([[0.9, 0.8], [0.3, 0.3]]), torch.tensor([[True, False], [True, False]])
    )
    quality.update(torch.tensor([0.6, 1.0]), torch.tensor([True, True]))
    # Right: 0.9, 0.3, 0.6, 1.0; wrong: 0.8, 0.3. Pairs won: 2 + 0.5 + 1 + 2 of 8.
    assert quality.auroc() == pytest.approx(5.5 / 8)
    assert quality.share_on_wrong() == pytest.approx(1.1 / 3.9)
    # Groups: 0.9 alone, 0.8 alone, the two of 0.3, 0.6 alone, 1.0 alone.
    error = (0.1 + 0.8 + abs(1 - 0.6) + 0.4 + 0.0) / 6
    assert quality.calibration_error() == pytest.approx(error)


def test_one_kind_of_pixels_has_no_ranking():
    quality = WeightQuality()
    quality.update(torch.rand(9), torch.ones(9, dtype=torch.bool))
    assert quality.auroc() != quality.auroc()
    assert quality.share_on_wrong() == 0


def test_ranks_correlate_whatever_the_scale():
    values = torch.tensor([0.3, -1.0, 7.0, 2.0])
    assert rank_correlation(values, values.exp()) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1, 2, 2, 3, 3, 3], [1, 3, 2, 4, 4, 5]),
        ([0, 0, 0, 1], [5, 3, 4, 4]),
        ([-math.inf, 0.5, 0.5, 2, 9], [1, 2, 2, 0.1, 7]),
        ([3, 1, 2], [0.25, 0.5, 0.75]),
    ],
)
def test_rank_correlation_is_spearmans_with_ties(one, other):
    found = rank_correlation(torch.DoubleTensor(one), torch.DoubleTensor(other))
    assert found == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)


@pytest.mark.parametrize("constant", [[], [1.0], [2.0, 2.0, 2.0], [1.0, math.nan, 2.0]])
def test_rank_correlation_of_constant_or_unknown_values_is_undefined(constant):
    one, other = torch.tensor(constant), torch.arange(len(constant)).float()
    assert rank_correlation(one, other) is None
    assert rank_correlation(other, one) is None


@pytest.fixture
def volumes():
    """Four images of two pixels, of two groups; class 2 is neither labeled nor predicted."""
    label = torch.tensor([[[1, 1]], [[0, 1]], [[0, 0]], [[0, 255]]])
    predicted = torch.tensor([[[1, 1]], [[0, 0]], [[0, 1]], [[0, 1]]])
    matrix = ConfusionMatrix(3, groups=Groups(["a", "b"], [0, 0, 1, 1]))
    for batch in ([2, 0], [1, 3]):
        matrix.update(predicted[batch], label[batch], batch)
    return matrix


def test_dice_and_groups_by_hand(volumes):
    found = volumes.report(["background", "heart", "lung"])
    # Over all images class 1 has 2 hits, 3 labeled and 3 predicted pixels.
    assert found["per_class_iou"]["heart"] == pytest.approx(2 / 4)
    assert found["per_class_dice"] == pytest.approx(
        {"background": 6 / 8, "heart": 4 / 6, "lung": None}
    )
    assert found["dice"] == pytest.approx((6 / 8 + 4 / 6) / 2)
    # Group a: 2 hits of 3 labeled and 2 predicted pixels; b: 1 is predicted, none labeled.
    groups = found["by_group"]
    assert groups["groups"] == 2
    assert groups["per_class_dice"]["heart"] == pytest.approx((4 / 5 + 0) / 2)
    assert groups["per_class_iou"]["heart"] == pytest.approx((2 / 3 + 0) / 2)
    assert groups["per_class_dice"]["lung"] is None
    assert groups["dice"] == pytest.approx(0.4)  # without background and what is not seen
    assert "by_group" not in ConfusionMatrix(2).report("xy")


def test_a_class_that_a_group_neither_shows_nor_predicts_does_not_count_in_it():
    matrix = ConfusionMatrix(2, groups=Groups(["a", "b"], [0, 1]))
    matrix.update(torch.tensor([[[1]], [[0]]]), torch.tensor([[[1]], [[0]]]), [0, 1])
    assert matrix.report("xy")["by_group"]["dice"] == 1


def test_the_table_has_a_column_a_score(volumes):
    rows = [
        line.split() for line in lay_out_scores(volumes.report(["bg", "heart", "lung"])).split("\n")
    ]
    assert rows[0] == ["IoU", "Dice", "IoU", "by", "group", "Dice", "by", "group"]
    assert rows[2] == ["heart", "50.00", "66.67", "33.33", "40.00"]
    assert rows[3] == ["lung", *["not", "seen"] * 4]
    assert rows[4][0] == "mean"
    assert rows[4][-1] == "40.00"
    assert " ".join(rows[6]) == "by group: 2 groups; mean without 'bg'"
    assert " ".join(rows[7]).startswith("mean over 2 of 3 classes")
