"""PyTorch's modes that the caller has set: off while the library computes, and on while the model's own code runs."""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree

_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia")  # that may have autocast
_OURS = torch.float32, torch.device("cpu")
#: The caller's default dtype and device, if they are not ours and set aside.
_caller: ContextVar[tuple[torch.dtype, torch.device] | None] = ContextVar("caller", default=None)
#: One entry for each running module of the caller's, of which the first holds the caller's defaults.
_running: ContextVar[list[contextlib.ExitStack] | None] = ContextVar("running", default=None)


@contextlib.contextmanager
def undisturbed(*, defaults: bool = True) -> Iterator[None]:
    """Compute as without any mode of the caller's; as a decorator, too.

    Inference mode and autocast are off, because a pass under them cannot be recorded or trained. The default dtype is
    float32 and the default device the CPU for the library's own tensors, but code of the caller still has its own
    where a module runs and where batches are made. All modes are those of the caller again at the end.

    Args:
        defaults: also the default dtype and device.
    """
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for device in filter(_autocasts, _DEVICES):
            # Within the caller's autocast, PyTorch would keep the casts of weights that training changes meanwhile.
            stack.callback(torch.clear_autocast_cache)
            stack.enter_context(torch.autocast(device, enabled=False, cache_enabled=False))
        theirs = torch.get_default_dtype(), torch.get_default_device()
        if defaults and theirs != _OURS:
            stack.enter_context(_defaults(*_OURS))
            stack.enter_context(_restored_in_modules(*theirs))
        yield


def _autocasts(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # this build of PyTorch does not know the device
        return False


@contextlib.contextmanager
def _defaults(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _restored_in_modules(*theirs: Any) -> Iterator[None]:
    """The caller's defaults while a module of this thread runs, from the outermost call on."""
    own = threading.get_ident()
    running: list[contextlib.ExitStack] = []

    def enter(*_: object) -> None:
        if threading.get_ident() == own:
            stack = contextlib.ExitStack()
            if not running:
                stack.enter_context(_defaults(*theirs))
            running.append(stack)

    def leave(*_: object) -> None:
        if threading.get_ident() == own and running:
            running.pop().close()

    before = register_module_forward_pre_hook(enter)
    after = register_module_forward_hook(leave, always_call=True)  # also if the module raises
    tokens = _caller.set(theirs), _running.set(running)
    try:
        yield
    finally:
        _caller.reset(tokens[0])
        _running.reset(tokens[1])
        while running:
            running.pop().close()
        before.remove()
        after.remove()


@contextlib.contextmanager
def cut_short() -> Iterator[None]:
    """For a pass that is stopped by an exception of which PyTorch tells no hook: the caller's defaults end with it."""
    running = _running.get()
    depth = 0 if running is None else len(running)
    try:
        yield
    finally:
        while running is not None and len(running) > depth:
            running.pop().close()


def drawn(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, made under the caller's defaults, which a loader's code may rely on."""
    theirs = _caller.get()
    if theirs is None:
        yield from batches
        return
    with _defaults(*theirs):
        iterator = iter(batches)
    while True:
        with _defaults(*theirs):
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


def ordinary(value: Any) -> Any:
    """Nested inputs with copies of tensors that were made in inference mode; everything else unchanged.

    PyTorch neither trains on such tensors nor writes into them.
    """
    leaves = pytree.tree_leaves(value)
    if not any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in leaves):
        return value
    with torch.inference_mode(False):
        return pytree.tree_map_only(Tensor, lambda tensor: tensor.clone() if tensor.is_inference() else tensor, value)
