"""Where networks run and in which precision."""

import os
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import Tensor, nn

from utils.distributed import world
from utils.errors import UserError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Batch = TypeVar("Batch", Tensor, tuple)


class Device:
    """A device with its precision: moves batches and networks there, opens autocast.

    Args:
        device: ``auto`` (the first accelerator, else the CPU), or a torch device: ``cpu``,
            ``cuda:1``, ``mps``. Of several processes on a machine each takes a CUDA device of
            its own.
        precision: ``fp32``; ``bf16`` or ``fp16`` autocast; ``auto`` is bf16 where the hardware
            is faster in it, fp16 on older CUDA devices, else fp32.

    Raises:
        UserError: the device does not exist here, or does not know the precision.
    """

    def __init__(self, device: str, precision: str) -> None:
        self.torch_device = _find_device(device)
        self.precision = _best_precision(self.torch_device) if precision == "auto" else precision
        if self.precision == "fp16" and self.torch_device.type == "cpu":
            raise UserError("precision: 'fp16' needs an accelerator; a CPU takes fp32 or bf16")

    def __str__(self) -> str:
        return f"{self.torch_device}, {self.precision}"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of convolutions."""
        return _DTYPES[self.precision]

    def autocast(self) -> torch.autocast:
        """Compute convolutions in the precision; sums that need float32 switch it off."""
        enabled = self.precision != "fp32"
        return torch.autocast(self.torch_device.type, self.dtype, enabled=enabled)

    def scaler(self) -> torch.amp.GradScaler:
        """Return a scaler of gradients, which does nothing but in fp16."""
        return torch.amp.GradScaler(self.torch_device.type, enabled=self.precision == "fp16")

    def place(self, net: nn.Module) -> nn.Module:
        """Move a network here, its convolutions channels-last."""
        return net.to(self.torch_device, memory_format=torch.channels_last)

    def move(self, batch: Batch) -> Batch:
        """Move a tensor, or a record of tensors and records, here; images channels-last."""
        if not isinstance(batch, Tensor):
            return type(batch)._make(self.move(part) for part in batch)
        layout = torch.channels_last if batch.dim() == 4 else torch.preserve_format
        return batch.to(self.torch_device, non_blocking=True, memory_format=layout)


def fixed_order(deterministic: bool = True) -> AbstractContextManager[None]:
    """Let cuDNN's convolutions add in the same order every time, or in any, in a ``with`` block.

    Which kernel is fastest is never found by trying: whole images have too many sizes for that.
    """
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=deterministic)


def _find_device(name: str) -> torch.device:
    found = name == "auto" and torch.accelerator.is_available()
    default = torch.accelerator.current_accelerator() if found else torch.device("cpu")
    device = default if name == "auto" else _existing(name)
    if device.type != "cuda" or world() == 1:
        return device
    if device.index is not None:
        raise UserError(f"device: '{name}' is one device for {world()} processes; use auto")
    device = _existing(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    torch.cuda.set_device(device)
    return device


def _existing(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no numbers
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device: '{name}' is not on this machine; take auto, cpu, cuda, cuda:N or mps"
        ) from error
    return device


def _best_precision(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type != "cpu":
        return "fp32"
    if not hasattr(torch.cpu, "get_capabilities"):  # before torch 2.12
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        known = torch.cpu.get_capabilities()
        # Without AMX, Intel's AVX512-BF16 is slower than fp32 (docs/speed.md).
        avx512 = known.get("avx512_bf16") and "Intel" not in known.get("cpu_name", "")
        fast = avx512 or known.get("amx_bf16") or known.get("bf16")  # "bf16" is ARM's
    return "bf16" if fast else "fp32"
