"""SGD as this family of methods uses it: a faster head, polynomial decay every iteration."""

from typing import Any

import torch
from torch import Tensor, nn

from utils.config import OptimizerSection
from utils.distributed import total, world


class Optimization:
    """Optimizer, learning-rate schedule and gradient scaler of a stage, as one thing to step.

    Args:
        net: parameters below ``net.backbone`` learn at ``lr``, the others ``head_multiple`` faster.
        settings: rates, momentum, weight decay, power of the decay.
        steps: iterations of the whole stage; the rate reaches zero after the last.
        scaler: of the precision.
        undo: put buffers back where a loss is not finite, at the price of a copy an iteration.
    """

    def __init__(
        self,
        net: nn.Module,
        settings: OptimizerSection,
        steps: int,
        scaler: torch.amp.GradScaler,
        undo: bool = False,
    ) -> None:
        backbone = list(net.backbone.parameters())
        of_backbone = {id(parameter) for parameter in backbone}
        head = [p for p in net.parameters() if id(p) not in of_backbone]
        groups = [
            {"params": backbone, "lr": settings.lr},
            {"params": head, "lr": settings.lr * settings.head_multiple},
        ]
        self._sgd = torch.optim.SGD(
            groups,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            # A fused first step that the scaler skips would leave momentum uninitialised.
            fused=not scaler.is_enabled(),
        )
        self._buffers = list(net.buffers()) if undo else []
        self._keep_buffers()
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._sgd, lambda step: max(0.0, 1.0 - step / steps) ** settings.power
        )
        self._scaler = scaler
        self._finite = True  # all losses of this step, so far

    @property
    def lr(self) -> float:
        """The backbone's learning rate now."""
        return self._sgd.param_groups[0]["lr"]

    def add(self, loss: Tensor) -> bool:
        """Add the gradient of a scalar loss to those of this step, if it is finite.

        Of several processes each brings its part of the loss; they decide together.

        Returns:
            Whether it was. If not, ``step`` will change no weight.
        """
        finite = bool(torch.isfinite(total(loss.detach())))
        if finite:
            # A process has its part of the loss, and parts add up; gradients are averaged.
            self._scaler.scale(loss * world()).backward()
        self._finite = self._finite and finite
        return finite

    def step(self) -> bool:
        """Go one step down the gradients that were added.

        Returns:
            Whether all losses were finite. If not, the rate has gone on; weights and momentum are
            untouched, and with ``undo`` the buffers are those before the forward pass, which may
            have put its infinities into the running means of batch norm.
        """
        finite, self._finite = self._finite, True
        if finite:
            self._scaler.step(self._sgd)
            self._scaler.update()
            self._keep_buffers()
        else:
            for buffer, kept in zip(self._buffers, self._kept, strict=True):
                buffer.copy_(kept)
        self._sgd.zero_grad()
        self._schedule.step()
        return finite

    def _keep_buffers(self) -> None:
        self._kept = [buffer.clone() for buffer in self._buffers]

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on."""
        parts = {"sgd": self._sgd, "schedule": self._schedule, "scaler": self._scaler}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned; the network has its own state back already."""
        self._sgd.load_state_dict(state["sgd"])
        self._schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        self._keep_buffers()
