"""SGD as this family of methods uses it: a faster head, polynomial decay every iteration."""

from typing import Any

import torch
from torch import Tensor, nn

from utils.config import OptimizerSection
from utils.errors import UserError


class Optimization:
    """Optimizer, learning-rate schedule and gradient scaler of a stage, as one thing to step.

    Args:
        net: parameters below ``net.backbone`` learn at ``lr``, the others ``head_multiple`` faster.
        settings: rates, momentum, weight decay, power of the decay.
        steps: iterations of the whole stage; the rate reaches zero after the last.
        scaler: of the precision.
    """

    def __init__(
        self, net: nn.Module, settings: OptimizerSection, steps: int, scaler: torch.amp.GradScaler
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
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._sgd, lambda step: max(0.0, 1.0 - step / steps) ** settings.power
        )
        self._scaler = scaler

    @property
    def lr(self) -> float:
        """The backbone's learning rate now."""
        return self._sgd.param_groups[0]["lr"]

    def step(self, loss: Tensor, place: str) -> None:
        """Go one step down the gradient of a scalar loss.

        Args:
            loss: scalar.
            place: stage and epoch, for the error.

        Raises:
            UserError: the loss is not finite; no weight has changed by it.
        """
        if not torch.isfinite(loss):
            raise UserError(
                f"{place}: the loss is {loss.item()}; lower optimizer.lr or set precision=fp32, "
                "and start over with --from-stage 1 or another name"
            )
        self._sgd.zero_grad()
        self._scaler.scale(loss).backward()
        self._scaler.step(self._sgd)
        self._scaler.update()
        self._schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to go on."""
        parts = {"sgd": self._sgd, "schedule": self._schedule, "scaler": self._scaler}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned."""
        self._sgd.load_state_dict(state["sgd"])
        self._schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
