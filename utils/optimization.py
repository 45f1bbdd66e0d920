"""SGD as this family of methods uses it: a faster head, polynomial decay every iteration."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from utils.config.schema import OptimizerSection
from utils.distributed import total, world


class StepOutcome(NamedTuple):
    """What came of a training step. On the device: to read it is to wait for the step.

    Attributes:
        loss: () float, of all processes.
        finite: () bool; if not, the step has changed no weight.
    """

    loss: Tensor
    finite: Tensor


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
            groups, momentum=settings.momentum, weight_decay=settings.weight_decay, fused=True
        )
        if settings.momentum:
            # A fused first step that is left out would leave momentum uninitialised.
            for parameter in net.parameters():
                momentum = torch.zeros_like(parameter)
                self._sgd.state[parameter]["momentum_buffer"] = momentum
        self._buffers = list(net.buffers()) if undo else []
        self._keep_buffers()
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._sgd, lambda step: max(0.0, 1.0 - step / steps) ** settings.power
        )
        self._scaler = scaler
        self._losses: list[Tensor] = []  # of this step, so far

    @property
    def lr(self) -> float:
        """The backbone's learning rate now."""
        return self._sgd.param_groups[0]["lr"]

    def add(self, loss: Tensor) -> None:
        """Add the gradient of a scalar loss to those of this step.

        Of several processes each brings its part of the loss. If their sum is not finite, ``step``
        will change no weight.
        """
        whole = total(loss.detach())
        self._losses.append(whole)
        # A process has its part of the loss, and parts add up; gradients are averaged. NaN for a
        # loss that is not finite makes all gradients NaN, which no scaler lets pass.
        weight = torch.where(whole.isfinite(), float(world()), torch.nan)
        self._scaler.scale(loss * weight).backward()

    def step(self) -> StepOutcome:
        """Go one step down the gradients that were added, if losses and gradients are finite.

        In fp16 gradients that overflow are left out, and scaled less from then on; that is no
        failure, see ``overflows``.

        Returns:
            How it went. If it is not finite, the rate has gone on; weights and momentum are
            untouched, and with ``undo`` the buffers are those before the forward pass, which may
            have put its infinities into the running means of batch norm.
        """
        loss = torch.stack(self._losses).sum()
        self._losses, finite = [], loss.isfinite()
        if not self._scaler.is_enabled():
            finite = finite & self._gradient_norm().isfinite()
            # The device itself leaves the step out: asking it first would be to wait for it.
            self._sgd.found_inf = (~finite).float()
        self._scaler.step(self._sgd)
        self._scaler.update()
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(torch.where(finite, buffer, kept))
        self._keep_buffers()
        self._sgd.zero_grad()
        self._schedule.step()
        return StepOutcome(loss, finite)

    @property
    def overflows(self) -> bool:
        """Whether gradients overflow fp16 however they are scaled; reading it waits."""
        return self._scaler.is_enabled() and self._scaler.get_scale() < 1.0

    def _gradient_norm(self) -> Tensor:
        """Return the gradient's length, which torch adds up fastest; beyond 1e19 it is inf."""
        parameters = [p for group in self._sgd.param_groups for p in group["params"]]
        return get_total_norm([p.grad for p in parameters if p.grad is not None])

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
