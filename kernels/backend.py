"""Which implementation a launcher takes: its Triton kernels, or its plain PyTorch twin."""

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

Backend = Literal["triton", "torch"]

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:  # pragma: no cover - the wheels of torch for Linux bring Triton along
        triton = tl = None


#: Arguments that change from launch to launch: kernels are not compiled anew for those that are 1, or multiples of 16.
_VARYING = ("round_number", "first_round", "tiles")


def jit(function: Any) -> Any:
    """triton.jit; without Triton the function as it is, which nobody launches."""
    if triton is None:
        return function
    varying = [name for name in inspect.signature(function).parameters if name in _VARYING]
    return triton.jit(do_not_specialize=varying)(function)


# float64 atomics, float64 matrix instructions and Triton's own support begin with Ampere.
_OLDEST_CAPABILITY = (8, 0)

_chosen: Backend | None = None


def uses_triton(tensor: Tensor) -> bool:
    """Whether the kernels of a launcher run on this tensor: on CUDA wherever they can, on a CPU never.

    A GPU that the kernels do not support, or a missing Triton, is warned of once; the twins give the same result.
    """
    if _chosen is not None:
        return _chosen == "triton"
    return tensor.is_cuda and _supported(tensor.device)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's GPU the current one, since Triton launches on that, wherever its arguments lie."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@contextlib.contextmanager
def use_backend(backend: Backend | None) -> Iterator[None]:
    """Within the context every launcher takes this implementation; None leaves the choice to the device.

    For tests and benchmarks. `triton` on CPU tensors needs the environment's TRITON_INTERPRET=1.
    """
    global _chosen
    before, _chosen = _chosen, backend
    try:
        yield
    finally:
        _chosen = before


@cache
def _supported(device: torch.device) -> bool:
    if triton is None:
        reason = "Triton is not installed (pip install triton)"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < _OLDEST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        reason = f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, expected 8.0 or newer"
    else:
        return True
    warnings.warn(f"plain PyTorch takes the place of the Triton kernels, which is slower: {reason}", stacklevel=4)
    return False
