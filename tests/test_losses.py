import math

import pytest
import torch
import torch.nn.functional as F

from model.losses import cross_entropy, ohem_cross_entropy, rectified_cross_entropy
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


@pytest.mark.parametrize("loss", [cross_entropy, ohem_cross_entropy])
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
