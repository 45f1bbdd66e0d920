import pytest
import torch
import torch.nn.functional as F

from model.ops.bilinear import pull_back, resize_by_products


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
