"""Several processes: collectives, and which part of the data each takes. Identities in one process.

``torchrun`` starts the processes and numbers them by environment variables. Functions that are
collective must be called by all processes, in the same order.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import wraps
from typing import ParamSpec, TypeVar

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
    """Tell whether this process has rank 0: it writes files and logs."""
    return rank() == 0


def local_rank() -> int:
    """Return the number of this process on its machine, from 0: the device that it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def mine(items: Sequence[T]) -> Sequence[T]:
    """Return this process's part: every ``world()``-th item."""
    return items[rank() :: world()] if world() > 1 else items


def gathered(rows: list[T]) -> list[T]:
    """Gather the parts of all processes in the order that ``mine`` took them from. Collective.

    Args:
        rows: results of this process's part, an entry an item; tensors on the CPU.
    """
    if world() == 1:
        return rows
    parts: list[list[T]] = [[] for _ in range(world())]
    dist.all_gather_object(parts, rows)
    return [parts[i % world()][i // world()] for i in range(sum(map(len, parts)))]


def merged(rows: list[dict[K, T]]) -> dict[K, T]:
    """Unite the dicts of all processes' items, in the order of ``gathered``. Collective."""
    return {key: value for row in gathered(rows) for key, value in row.items()}


def reduced(tensor: Tensor) -> Tensor:
    """Sum a tensor over the processes. No gradient. Collective."""
    if world() == 1:
        return tensor
    summed = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed)
    return summed


def counted(*masks: Tensor) -> Tensor:
    """Count the true values of bool masks over all processes: (masks,) float32. Collective."""
    return reduced(torch.stack([mask.sum() for mask in masks]).float())


def largest(number: int) -> int:
    """Return the largest of the processes' numbers. Collective."""
    if world() == 1:
        return number
    numbers = torch.tensor(number)  # on the CPU: no device has to finish for this
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


def broadcast(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function on rank 0 and broadcast what it returns. Collective."""
    if world() == 1:
        return work(*args, **kwargs)
    outcome = [work(*args, **kwargs) if is_first() else None]
    dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    return outcome[0]


def by_first(work: Callable[P, None]) -> Callable[P, None]:
    """Call a function on rank 0 alone, such as one that writes a common file."""

    @wraps(work)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        if is_first():
            work(*args, **kwargs)

    return guarded


def barrier() -> None:
    """Wait for all processes. Collective."""
    largest(0)


def parallel(net: nn.Module) -> nn.Module:
    """Wrap a network so that its gradients are averaged over the processes. Collective.

    Batch norm becomes ``nn.SyncBatchNorm`` on accelerators; on a CPU each process normalises by
    its own part of the batch. ``net`` stays the one to save and to load: it shares its weights.
    """
    if world() == 1:
        return net
    if next(net.parameters()).device.type != "cpu":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return nn.parallel.DistributedDataParallel(
        net, forward_sync_buffers=False, gradient_as_bucket_view=True
    )


def averaging(net: nn.Module, last: bool) -> AbstractContextManager:
    """Average gradients over the processes in the last part of a batch only.

    Args:
        net: of ``parallel``; forward and backward pass run inside.
        last: whether this is the last part.
    """
    wrapped = isinstance(net, nn.parallel.DistributedDataParallel)
    return net.no_sync() if wrapped and not last else nullcontext()


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
