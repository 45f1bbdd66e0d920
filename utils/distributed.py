"""Several processes as one: what they share, add up and wait for. In one process, identities.

``torchrun`` starts the processes and says by environment variables who is who. What is called
collective here must be called by all of them, in the same order.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import Stopped, UserError

P, K, T = ParamSpec("P"), TypeVar("K"), TypeVar("T")
_PATIENCE = timedelta(hours=12)  # for what one process does alone, such as hashing


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Tell whether this process writes what all share."""
    return rank() == 0


def local_rank() -> int:
    """Return the number of this process on its machine, from 0: the device that it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def mine(items: Sequence[T]) -> Sequence[T]:
    """Return this process's part: every ``world()``-th item."""
    return items[rank() :: world()] if world() > 1 else items


def gathered(rows: list[T]) -> list[T]:
    """Put the parts of all together again, in the order that ``mine`` took them from. Collective.

    Args:
        rows: what came of this process's part, an entry an item; tensors on the CPU.
    """
    if world() == 1:
        return rows
    parts: list[list[T]] = [[] for _ in range(world())]
    dist.all_gather_object(parts, rows)
    return [parts[i % world()][i // world()] for i in range(sum(map(len, parts)))]


def merged(rows: list[dict[K, T]]) -> dict[K, T]:
    """Unite the dicts of all processes' items, in the order of ``gathered``. Collective."""
    return {key: value for row in gathered(rows) for key, value in row.items()}


def total(tensor: Tensor) -> Tensor:
    """Sum a tensor over the processes; gradients flow to all of them. Collective."""
    return tensor if world() == 1 else _Total.apply(tensor)


def everyones(tensor: Tensor) -> Tensor:
    """Concatenate the processes' (N,) tensors, all of one size. Without gradient. Collective."""
    if world() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def largest(number: int) -> int:
    """Return the largest of the processes' numbers. Collective."""
    if world() == 1:
        return number
    numbers = torch.tensor(number)  # on the CPU: no device has to finish for this
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


def shared(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Let the first process work, and return to all what came of it. Collective."""
    if world() == 1:
        return work(*args, **kwargs)
    outcome = [work(*args, **kwargs) if is_first() else None]
    dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    return outcome[0]


def by_first(work: Callable[P, None]) -> Callable[P, None]:
    """Let only the first process do what all call, such as writing a file that they share."""

    @wraps(work)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        if is_first():
            work(*args, **kwargs)

    return guarded


def barrier() -> None:
    """Wait for all processes. Collective."""
    largest(0)


def parallel(net: nn.Module) -> nn.Module:
    """Let a network that trains average its gradients over the processes. Collective.

    ``net`` stays the one to save and to load: it shares its weights. Gradients are averaged for as
    long as what is returned lives.
    """
    if world() == 1:
        return net
    return nn.parallel.DistributedDataParallel(
        net, forward_sync_buffers=False, gradient_as_bucket_view=True
    )


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that ``torchrun`` started, while the block runs.

    A process that fails prints its error; ``torchrun`` then ends the others. Without ``torchrun``
    nothing happens.

    Raises:
        UserError: the connection to another process broke.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    # Two backends: decisions are taken on the CPU, whatever the device.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield
    except Stopped as stopped:
        if is_first():
            raise
        raise SystemExit(128 + stopped.number) from None  # one line for all
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise UserError(
            f"torchrun: another process has ended or cannot be reached, and said why unless memory "
            f"ran out ({str(error).splitlines()[0]}); the same command continues"
        ) from error
    dist.destroy_process_group()


class _Total(torch.autograd.Function):
    """The sum over the processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(_: Any, tensor: Tensor) -> Tensor:
        summed = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _Total.apply(gradient)
