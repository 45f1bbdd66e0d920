"""Several processes, started by ``torchrun``: collectives, and which part of the data each takes.

All processes must call a function that is collective, in the same order. In a process that is alone
it returns what it is given.
"""

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import wraps
from inspect import signature
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import Stopped, UserError

P, K, T = ParamSpec("P"), TypeVar("K"), TypeVar("T")
_PARENT_DEATH_SIGNAL = 1  # of Linux's prctl
_TIMEOUT = timedelta(hours=12)  # of collectives: one process may hash or download alone
# The name of DistributedDataParallel's argument before and since torch 2.13.
_KNOWN = signature(nn.parallel.DistributedDataParallel).parameters
_NAMES = ("forward_sync_buffers", "broadcast_buffers")
_SYNC_BUFFERS = next(name for name in _NAMES if name in _KNOWN)


def rank() -> int:
    """Return the rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Tell whether this process has rank 0, which writes files and logs."""
    return rank() == 0


def shard(items: Sequence[T]) -> Sequence[T]:
    """Return this process's part: every ``world()``-th item."""
    return items[rank() :: world()] if world() > 1 else items


def gather_list(rows: list[T]) -> list[T]:
    """Gather the rows of every process, one for each item of its ``shard``, in their order.

    Batches of ``whole_images`` are such items. Collective.
    """
    if world() == 1:
        return rows
    parts: list[list[T]] = [[] for _ in range(world())]
    dist.all_gather_object(parts, rows)
    return [parts[i % world()][i // world()] for i in range(sum(map(len, parts)))]


def gather_dict(rows: list[dict[K, T]]) -> dict[K, T]:
    """Unite the dicts of all processes' items, in the order of ``gather_list``. Collective."""
    return {key: value for row in gather_list(rows) for key, value in row.items()}


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over the processes. No gradient. Collective."""
    if world() == 1:
        return tensor
    summed = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed)
    return summed


def all_reduce_count(*masks: Tensor) -> Tensor:
    """Count the true values of bool masks over all processes: (masks,) float32. Collective."""
    return all_reduce_sum(torch.stack([mask.sum() for mask in masks]).float())


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


def on_rank_zero(work: Callable[P, None]) -> Callable[P, None]:
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
        net, gradient_as_bucket_view=True, **{_SYNC_BUFFERS: False}
    )


@torch.no_grad()
def broadcast_buffers(*nets: nn.Module) -> None:
    """Give every process rank 0's buffers, in place: running statistics, which differ on CPUs.

    Collective.
    """
    if world() > 1:
        for buffer in (buffer for net in nets for buffer in net.buffers()):
            dist.broadcast(buffer, src=0)


def averaging(net: nn.Module, last: bool) -> AbstractContextManager:
    """Average the gradients of a net of ``parallel`` in the last part of a batch only."""
    return nullcontext() if last or world() == 1 else net.no_sync()


def _refuse_lost_torchrun() -> None:
    """Raise where torchrun has ended before this process asked to end with it.

    Connecting would wait for as long as the collectives' timeout.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return  # torchrun does not hold the store
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection((host, port), timeout=60).close()
    except OSError as error:
        raise UserError(
            f"torchrun: has ended, or cannot be reached at {host}:{port} ({error}); type the "
            "command again"
        ) from error


@contextmanager
def process_group() -> Iterator[None]:
    """Connect the processes that ``torchrun`` started, if it did, while the block runs.

    A process that fails prints its error; ``torchrun`` then ends the others.

    Raises:
        UserError: torchrun has ended, or the connection to another process broke.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    if sys.platform == "linux":  # a torchrun that is killed cannot end its processes
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    _refuse_lost_torchrun()
    # Decisions are reduced on the CPU, gradients on the device.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT)
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
