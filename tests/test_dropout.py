import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.ops.dropout import Dropout, Dropout2d, seed_dropout


def dropped(layers, seeds, images):
    """What two layers in a row make of a batch of images and their partners."""
    net = nn.Sequential(nn.Conv2d(1, 1, 1), *layers)
    seed_dropout(net, seeds)
    return net[1:](images)


@pytest.mark.parametrize("layer", [Dropout, Dropout2d])
@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0], [1, 2, 3]], [[3, 0], [2], [1]]])
def test_noise_is_the_samples_whatever_the_batch_holds_besides(layer, parts):
    images, layers = torch.ones(2, 4, 16, 5, 7), (layer(0.5), layer(0.25))
    seeds = [11, 12, 13, 14]
    whole = dropped(layers, seeds, images.flatten(0, 1)).unflatten(0, (2, 4))
    for part in parts:
        alone = dropped(layers, [seeds[i] for i in part], images[:, part].flatten(0, 1))
        assert torch.equal(alone.unflatten(0, (2, len(part))), whole[:, part])
    maps = [*whole[0], *whole[1]]
    assert not any(torch.equal(a, b) for i, a in enumerate(maps) for b in maps[:i])


@pytest.mark.parametrize(("layer", "chance"), [(Dropout, 0.1), (Dropout2d, 0.5), (Dropout, 0.9)])
def test_what_is_left_is_as_frequent_and_as_large_as_it_should_be(layer, chance):
    out = dropped([layer(chance)], [1, 2], torch.ones(2, 5000, 3, 3))
    kept = out != 0
    assert kept.float().mean().item() == pytest.approx(1 - chance, abs=0.02)
    torch.testing.assert_close(
        out[kept], torch.full_like(out[kept], 1 / (1 - chance)), rtol=1e-3, atol=0
    )
    if layer is Dropout2d:
        assert torch.equal(kept.all((2, 3)), kept.any((2, 3)))


def test_gradient_passes_where_values_do():
    images = torch.randn(2, 4, 3, 3, requires_grad=True)
    out = dropped([Dropout(0.5)], [1, 2], images)
    out.sum().backward()
    torch.testing.assert_close(images.grad * images, out)


@pytest.mark.parametrize(
    ("layer", "torchs"), [(Dropout(0.3), F.dropout), (Dropout2d(0.3), F.dropout2d)]
)
def test_without_seeds_it_is_torchs_dropout(layer, torchs):
    images = torch.randn(2, 4, 3, 3)
    torch.manual_seed(0)
    expected = torchs(images, 0.3)
    torch.manual_seed(0)
    assert torch.equal(layer(images), expected)


def test_nothing_is_dropped_in_eval_mode_and_nothing_is_kept_in_checkpoints():
    net = nn.Sequential(nn.Conv2d(1, 1, 1), Dropout(0.5))
    keys = list(net.state_dict())
    seed_dropout(net, [1])
    images = torch.randn(1, 1, 8, 8)
    assert torch.equal(copy.deepcopy(net).eval()[1](images), images)
    assert list(net.state_dict()) == keys


def test_all_or_nothing_is_dropped_at_the_ends():
    images = torch.randn(1, 1, 8, 8)
    assert torch.equal(dropped([Dropout(0.0)], [1], images), images)
    assert not dropped([Dropout(1.0)], [1], images).any()
