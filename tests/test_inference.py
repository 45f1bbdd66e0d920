import torch
from torch import nn

from model import SegmentationOutput
from utils.inference import Predictor
from utils.precision import Device

CPU = Device("cpu", "fp32")


class Pointwise(nn.Module):
    """Logits are the channels, times three."""

    def forward(self, images):
        return SegmentationOutput(3 * images, images)


class Positional(nn.Module):
    """Logits also grow to the right, so that a mirrored image gives another answer."""

    def forward(self, images):
        ramp = torch.linspace(0, 1, images.shape[-1]).view(1, 1, 1, -1)
        weights = torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1, 1)
        return SegmentationOutput(images + ramp * weights, images)


def test_a_pointwise_network_gives_the_softmax_of_its_logits():
    images = torch.randn(2, 3, 8, 9)
    predicted = Predictor(Pointwise(), CPU)(images, (8, 9))
    torch.testing.assert_close(predicted, (3 * images).softmax(dim=1))


def test_flip_does_not_change_a_pointwise_network():
    images = torch.randn(1, 3, 8, 9)
    plain, flipped = (Predictor(Pointwise(), CPU, flip=f)(images, (8, 9)) for f in (False, True))
    torch.testing.assert_close(plain, flipped)


def test_flip_averages_the_mirrored_answer_mirrored_back():
    images = torch.zeros(1, 3, 1, 5)
    predicted = Predictor(Positional(), CPU, flip=True)(images, (1, 5))
    ramp = torch.linspace(0, 1, 5)
    logits = torch.outer(torch.tensor([0.0, 1.0, 2.0]), ramp)
    expected = (logits.softmax(0) + logits.flip(-1).softmax(0)) / 2
    torch.testing.assert_close(predicted[0, :, 0], expected)


def test_scales_average_and_keep_a_linear_image():
    # Bilinear resizing with corners aligned maps a ramp to a ramp at every scale, and back.
    row = torch.linspace(-1, 1, 9)
    images = torch.stack([row, -row, 0.5 * row])[None, :, None].expand(1, 3, 5, 9)
    one = Predictor(Pointwise(), CPU)(images, (10, 18))
    many = Predictor(Pointwise(), CPU, scales=(0.5, 1.0, 2.0))(images, (10, 18))
    torch.testing.assert_close(one, many, atol=1e-5, rtol=0)
    torch.testing.assert_close(many.sum(dim=1), torch.ones(1, 10, 18))


def test_the_answer_has_the_size_asked_for_and_the_network_stays_in_eval_mode():
    net = Pointwise().train()
    assert Predictor(net, CPU, scales=(0.3,))(torch.randn(1, 3, 7, 5), (31, 17)).shape[-2:] == (
        31,
        17,
    )
    assert not net.training
