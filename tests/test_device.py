from typing import NamedTuple

import pytest
import torch
from torch import nn

from utils.device import Device
from utils.errors import UserError


class Inner(NamedTuple):
    image: torch.Tensor


class Record(NamedTuple):
    inner: Inner
    label: torch.Tensor


def test_records_move_with_images_channels_last():
    record = Record(Inner(torch.randn(2, 3, 4, 5)), torch.zeros(2, 4, 5, dtype=torch.long))
    moved = Device("cpu", "fp32").move(record)
    assert isinstance(moved, Record)
    assert moved.inner.image.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(moved.inner.image, record.inner.image)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_convolutions_are_in_the_precision_with_float32_weights(precision):
    device = Device("cpu", precision)
    net = device.place(nn.Conv2d(3, 4, 3))
    with device.autocast():
        assert net(torch.randn(1, 3, 8, 8)).dtype == device.dtype
    assert net.weight.dtype == torch.float32


def test_auto_finds_a_device_and_a_precision():
    device = Device("auto", "auto")
    assert device.precision in ("fp32", "bf16", "fp16")
    assert str(device) == f"{device.torch_device}, {device.precision}"


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, "bf16"),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, "fp32"),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False, "amx_bf16": False}, "fp32"),
        ({"cpu_name": "Neoverse-V1", "bf16": True}, "bf16"),
        ({}, "fp32"),
    ],
)
def test_auto_takes_bf16_on_cpus_that_are_faster_in_it(monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert Device("cpu", "auto").precision == precision


@pytest.mark.parametrize("name", ["cuda:63", "tpu", "cpu:x", ""])
def test_an_absent_device_is_named(name):
    with pytest.raises(UserError, match=f"device: '{name}' is not on this machine"):
        Device(name, "fp32")


def test_fp16_needs_an_accelerator():
    with pytest.raises(UserError, match="precision: 'fp16' needs an accelerator"):
        Device("cpu", "fp16")
