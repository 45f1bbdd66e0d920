"""A CUDA device that the CPU stands in for: its tensors are marked, and mixing them is an error.

Within ``simulated_cuda()`` the device ``cuda`` exists, whatever the machine has. Its tensors are
the CPU's with another class, so that programs run to their end with true numbers, on the paths that
they take on a CUDA device. What such a device refuses is refused: operations on tensors of two
devices (the CPU's may have no dimensions, or be an index), numpy of what lies there, the CPU's
generator for random numbers there. Autocast is the CPU's. Kernels, NCCL, ``torch.compile`` and the
order of streams need the real device.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

THERE = torch.device("cuda:0")
_FACTS = {  # of a tensor that lies there
    Tensor.device.__get__: THERE,
    Tensor.is_cuda.__get__: True,
    Tensor.is_cpu.__get__: False,
}
_MOVES = {Tensor.to: (), Tensor.cpu: ("cpu",), Tensor.cuda: ("cuda",)}
_MAY_MIX = {Tensor.copy_, Tensor.__setitem__, Tensor.data.__set__, torch.as_tensor}
_INDEXES = {Tensor.__getitem__, Tensor.index_put_}  # the index may be the CPU's, not the device's
_NEEDS_ALL_THERE = {torch.cat, torch.stack}  # tensors without dimensions, too
_IN_PLACE = re.compile(r"[a-z]\w*_|__i\w+__")  # names of what changes its first tensor
_TO_NUMPY = {Tensor.numpy, Tensor.__array__}
_WAITS = {
    *(Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__),
    *(Tensor.__index__, Tensor.nonzero, Tensor.unique, torch.equal),
}


class Elsewhere(Tensor):
    """A tensor of the simulated device."""

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _call(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
            memo[id(self)]._is_param = getattr(self, "_is_param", False)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)


class _Everywhere(TorchFunctionMode):
    """Sees calls without a tensor of the device, too."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return _call(func, args, kwargs or {})


waits: Counter[str] = Counter()  # calls that wait for the device, by name


@contextmanager
def simulated_cuda() -> Iterator[Counter[str]]:
    """Let ``cuda`` be a device; yield the count of calls that wait for it, by name."""
    waits.clear()
    autocast = torch.autocast

    def of_cpu(device_type: str, *args: Any, **kwargs: Any) -> torch.autocast:
        return autocast("cpu", *args, **kwargs)

    def always(value: Any) -> Callable:
        return lambda *_, **__: value

    with ExitStack() as stack:
        for place, name, replacement in (
            (torch, "autocast", of_cpu),
            (torch.accelerator, "is_available", always(True)),
            (torch.accelerator, "current_accelerator", always(None)),  # whose streams are asked for
            (torch.accelerator, "current_device_index", always(0)),
            (torch.accelerator, "set_device_index", always(None)),
            (torch.cuda, "is_initialized", always(True)),
            (torch.cuda, "current_device", always(0)),
            (torch.cuda, "set_device", always(None)),
            (torch.cuda, "is_bf16_supported", always(True)),
            (torch.cuda.amp.common, "amp_definitely_not_available", always(False)),
            (Tensor, "pin_memory", Tensor.clone),
        ):
            stack.enter_context(patch.object(place, name, replacement, create=True))
        stack.enter_context(_Everywhere())
        yield waits


def _call(func: Callable, args: tuple, kwargs: dict) -> Any:
    """Call a function of torch's as if marked tensors lay on the device."""
    if func in _MOVES:
        return _move(*args, *_MOVES[func], **kwargs)
    tensors = list(_tensors((args, kwargs)))
    there = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    if there:
        if func in _FACTS and isinstance(args[0], Elsewhere):
            return _FACTS[func]
        if func in _TO_NUMPY:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        if func is torch._has_compatible_shallow_copy_type:
            return all(isinstance(tensor, Elsewhere) for tensor in tensors)
        if func in _WAITS:
            waits[func.__name__] += 1
        _refuse_mixing(func, args, tensors)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == "cuda"
        kwargs = {**kwargs, "device": "cpu"} if there else kwargs
        if there and kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*args, **kwargs)
    return _marked(result) if there else result


def _move(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Call ``to``: a copy, if it is to another device."""
    was_there = goes_there = isinstance(tensor, Elsewhere)

    def on_cpu(word: Any) -> Any:
        nonlocal goes_there
        if isinstance(word, str | torch.device):
            goes_there, word = torch.device(word).type == "cuda", "cpu"
        elif isinstance(word, Tensor):
            goes_there = isinstance(word, Elsewhere)
        return word

    args, kwargs = [*map(on_cpu, args)], {key: on_cpu(word) for key, word in kwargs.items()}
    if was_there != goes_there:
        kwargs["copy"] = True
        waits["to the CPU"] += was_there
    with torch._C.DisableTorchFunctionSubclass():
        result = tensor.to(*args, **kwargs)
    return _marked(result) if goes_there else result


def _refuse_mixing(func: Callable, args: tuple, tensors: list[Tensor]) -> None:
    """Raise as torch does where tensors of both devices are given."""
    if func in _MAY_MIX or (func in _INDEXES and isinstance(args[0], Elsewhere)):
        return
    here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere)]
    is_changed = _IN_PLACE.fullmatch(func.__name__) and any(args[0] is tensor for tensor in here)
    if not is_changed and func not in _NEEDS_ALL_THERE:
        here = [tensor for tensor in here if tensor.dim()]
    if here:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
            f"and cpu: {func.__name__} got {[tuple(tensor.shape) for tensor in here]} on the CPU"
        )


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from _tensors(tuple(tree.values()))
    elif isinstance(tree, tuple | list):
        for branch in tree:
            yield from _tensors(branch)


def _marked(result: Any) -> Any:
    for tensor in _tensors(result):
        if not isinstance(tensor, Elsewhere):
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            tensor.__class__ = Elsewhere
            tensor._is_param = is_parameter
    return result
