"""The meter of weight rules, on numbers checked by hand."""

import pytest
import torch

from utils.diagnosis import WeightQuality, rank_correlation


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
