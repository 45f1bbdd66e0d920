"""Optimizer, learning-rate schedule and gradient scaler of a training stage."""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from utils.config.schema import OptimizerSection
from utils.distributed import all_reduce_sum, world

_BLOCK = re.compile(r"\bblocks\.(\d+)\.")


class Optimization:
    """SGD or AdamW with a polynomial decay to zero, stepped once an iteration.

    Args:
        net: parameters below ``net.backbone`` learn at ``lr``, the others at ``head_multiple``
            times that.
        settings: learning rates, decay, warm-up.
        iterations: of the whole stage; the rate reaches zero after the last.
        scaler: scales gradients in fp16, and does nothing in other precisions.
        average: a network like ``net``, which becomes its running average; None for none.
        decay: of the average, an iteration; lower in the first ones, 1 - 1 / (iteration + 1).
    """

    def __init__(
        self,
        net: nn.Module,
        settings: OptimizerSection,
        iterations: int,
        scaler: torch.amp.GradScaler,
        average: nn.Module | None = None,
        decay: float = 0.99,
    ) -> None:
        self._net, self.average, self._decay = net, average, decay
        groups = _parameter_groups(net, settings)
        self._peaks = [group["lr"] for group in groups]
        weight_decay = settings.weight_decay
        if settings.name == "sgd":
            # Fused SGD leaves its momentum uninitialised where the scaler skips the first update.
            fused = not scaler.is_enabled()
            options = {"momentum": settings.momentum, "weight_decay": weight_decay, "fused": fused}
            self._optimizer = torch.optim.SGD(groups, **options)
        else:
            self._optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
        self._settings, self._iterations, self._scaler = settings, iterations, scaler
        self._done = 0  # iterations
        self._loss: Tensor | float = 0.0  # of this iteration so far
        self._set_rates()

    @property
    def lr(self) -> float:
        """The learning rate of the backbone (its last layer) in this iteration."""
        return self._settings.lr * self._factor()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a part of the batch's loss, a scalar; the parts add up to it."""
        self._loss = self._loss + loss.detach()
        # DistributedDataParallel averages gradients over processes, and the parts add up.
        self._scaler.scale(loss * world()).backward()

    def step(self) -> float | None:
        """Update the weights, unless the loss or the gradient is not finite. Collective.

        In fp16 a gradient that overflows is expected: the scaler skips the update and scales less
        from then on, until the scale is below 1.

        Returns:
            None after an update; else the loss of the batch, and training should stop.
        """
        loss, self._loss = all_reduce_sum(torch.as_tensor(self._loss)), 0.0
        if self._scaler.is_enabled():
            finite = loss.isfinite() and self._scaler.get_scale() >= 1.0
        else:
            gradients = [p.grad for p in self._net.parameters() if p.grad is not None]
            finite = (loss + get_total_norm(gradients)).isfinite()
        if not finite:  # waits for the device
            return loss.item()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        self._done += 1
        self._set_rates()
        self._update_average()
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to continue."""
        state = {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}
        average = None if self.average is None else self.average.state_dict()
        return {**state, "iterations": self._done, "average": average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self._done = int(state["iterations"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self._set_rates()

    @torch.no_grad()
    def _update_average(self) -> None:
        """Move the average towards the network; buffers, as of batch norm, are copied."""
        if self.average is None:
            return
        weights = list(self._net.parameters())
        kept = min(self._decay, 1.0 - 1.0 / (self._done + 1))
        torch._foreach_lerp_(list(self.average.parameters()), weights, 1.0 - kept)
        for own, buffer in zip(self.average.buffers(), self._net.buffers(), strict=True):
            own.copy_(buffer)

    def _factor(self) -> float:
        """Return the share of the peak learning rate: linear warm-up times polynomial decay."""
        decay = max(0.0, 1.0 - self._done / self._iterations) ** self._settings.power
        return decay * min(1.0, (self._done + 1) / (self._settings.warmup + 1))

    def _set_rates(self) -> None:
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * self._factor()


def _parameter_groups(net: nn.Module, settings: OptimizerSection) -> list[dict[str, Any]]:
    """Group parameters by learning rate: layers of the backbone, and the head.

    With ``layer_decay`` d, block k of n transformer blocks learns at lr * d ** (n - k), what comes
    before the blocks at lr * d ** (n + 1), the rest of the backbone at lr (BEiT, Bao et al., ICLR
    2022; blocks are recognised by ``blocks.<k>.`` in the name of a parameter).
    """
    names, backbone = zip(*net.backbone.named_parameters(), strict=True)
    blocks = [int(found[1]) if (found := _BLOCK.search(name)) else None for name in names]
    count = max((block + 1 for block in blocks if block is not None), default=0)
    depth = count + 1 if count else 0
    groups: dict[float, list[nn.Parameter]] = {}
    for block, parameter in zip(blocks, backbone, strict=True):
        if block is not None:
            depth = count - block
        elif depth <= count:  # after the blocks
            depth = 0
        groups.setdefault(settings.lr * settings.layer_decay**depth, []).append(parameter)
    in_backbone = set(map(id, backbone))
    head = [p for p in net.parameters() if id(p) not in in_backbone]
    rows = [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]
    return [*rows, {"params": head, "lr": settings.lr * settings.head_multiple}]
