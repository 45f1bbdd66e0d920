import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from utils.evaluation import ConfusionMatrix


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


def test_class_that_is_only_predicted_counts_as_zero():
    matrix = matrix_of(3, [0, 2], [0, 0])
    assert matrix.iou()[2] == 0
    assert matrix.mean_iou() == pytest.approx((1 / 2 + 0) / 2)


def test_nothing_valid_is_nan_and_not_zero():
    matrix = matrix_of(2, [0, 1], [255, 255])
    assert math.isnan(matrix.mean_iou())
    assert math.isnan(matrix.pixel_accuracy())


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


def test_counts_stay_exact_beyond_float32():
    matrix = ConfusionMatrix(2)
    matrix.counts[0, 0] = 2**24
    matrix.update(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    assert matrix.counts[0, 0] == 2**24 + 1
    matrix.counts[0, 1] = 2**60
    assert matrix.iou()[0].item() == (2**24 + 1) / (2**24 + 1 + 2**60)
