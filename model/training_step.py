"""One training step: a batch passes in parts, whose gradients add up to one update."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dataset.training import parts
from model.objectives import Loss
from model.ops.dropout import seed_dropout
from utils.device import Device
from utils.optimization import Optimization, StepOutcome


def training_step(
    net: nn.Module,
    loss: Callable[[Any, Any], Loss],
    optimization: Optimization,
    device: Device,
    batch: Any,
    seeds: Tensor,
    count: int = 1,
) -> tuple[dict[str, Tensor], StepOutcome]:
    """Go down the loss of a batch once.

    Args:
        net: the student.
        loss: of a part of a batch, and the batch; the losses of all parts add up to the batch's.
        optimization: of the student.
        device: its precision; the batch is there.
        batch: a record of tensors.
        seeds: (B,) long, of each sample's dropout.
        count: parts; batch norm sees one at a time.

    Returns:
        What the loss shows of the batch, this process's part, by name; and how the step went.
    """
    shown: dict[str, Tensor] = {}
    for part, own in zip(parts(batch, count), seeds.chunk(count), strict=True):
        seed_dropout(net, own.tolist())
        with device.autocast():
            answer = loss(part, batch)
        optimization.add(answer.total)
        for name, value in answer.shown.items():
            shown[name] = shown[name] + value.detach() if name in shown else value.detach()
    return shown, optimization.step()
