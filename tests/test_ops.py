import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.ops.bilinear import pull_back, resize_by_products
from model.ops.dilated import DilatedConv2d


def test_pull_back_is_the_adjoint_of_the_resize():
    """<U x, m> = <x, U' m> for any x and m; and sums stay, since every row of U sums to 1."""
    x, masks = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 17, 26).double()
    resized = F.interpolate(x[:, None], (17, 26), mode="bilinear", align_corners=False)[:, 0]
    pulled = pull_back(masks, (5, 7))
    torch.testing.assert_close((resized * masks).sum(), (x * pulled).sum())
    torch.testing.assert_close(pulled.sum(dim=(1, 2)), masks.sum(dim=(1, 2)))


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(17, 26), (4, 3), (5, 7), (1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_products_resize_as_torch_does_and_so_do_their_gradients(size, align_corners, layout):
    maps = torch.randn(2, 3, 5, 7, dtype=torch.float64).to(memory_format=layout)
    weight = torch.randn(2, 3, *size, dtype=torch.float64)
    answers = []
    for form in (resize_by_products, lambda m, s, a: F.interpolate(m, s, None, "bilinear", a)):
        leaf = maps.clone().requires_grad_()
        resized = form(leaf, size, align_corners)
        (resized * weight).sum().backward()
        answers.append((resized.detach(), leaf.grad))
    torch.testing.assert_close(*answers)


def test_products_keep_the_dtype_and_add_in_float32():
    maps = torch.randn(1, 2, 9, 9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        resized = resize_by_products(maps, (33, 33), True)
    assert resized.dtype == torch.bfloat16
    expected = resize_by_products(maps.float(), (33, 33), True).bfloat16()
    assert torch.equal(resized, expected)


def gradients(forward, conv, maps):
    """Outcome, and gradients of maps and parameters, for one fixed direction."""
    outcome = forward(maps)
    direction = torch.linspace(-1, 1, outcome.numel(), dtype=outcome.dtype).view_as(outcome)
    return outcome, *torch.autograd.grad(outcome, [maps, *conv.parameters()], direction)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(7, 4), (1, 1), (5, 12), (3, 40)])
@pytest.mark.parametrize("rate", [1, 2, 6, 36])
def test_equals_the_convolution_in_float64(rate, size, bias):
    torch.manual_seed(0)
    conv = DilatedConv2d(5, 4, rate, bias).double()
    maps = torch.randn(2, 5, *size, dtype=torch.float64, requires_grad=True)
    plain = nn.Conv2d.forward
    ours = gradients(conv, conv, maps)
    expected = gradients(lambda x: plain(conv, x), conv, maps)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_autocast_rounds_products_not_their_sum():
    torch.manual_seed(0)
    conv = DilatedConv2d(64, 8, rate=3)
    maps = torch.randn(2, 64, 20, 20)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = conv(maps), nn.Conv2d.forward(conv, maps)
    assert ours.dtype == torch.bfloat16
    weight, rounded = conv.weight.detach().bfloat16().double(), maps.bfloat16().double()
    exact = F.conv2d(rounded, weight, padding=3, dilation=3)
    error, plain_error = ((x.double() - exact).abs().max() for x in (ours, theirs))
    assert error <= 2 * plain_error


def test_keys_and_first_numbers_are_those_of_the_convolution():
    torch.manual_seed(3)
    ours = DilatedConv2d(6, 4, rate=2).state_dict()
    torch.manual_seed(3)
    theirs = nn.Conv2d(6, 4, 3, padding=2, dilation=2, bias=False).state_dict()
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["weight"], theirs["weight"])
