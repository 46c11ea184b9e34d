"""Which implementation a launcher takes, its Triton kernels or its plain PyTorch twin, and how kernels are launched."""

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


#: Compiled kernels and the constants that they end with, by what `launch` knows of a call.
_kept: dict[tuple[object, ...], tuple[Any, list[Any]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | tuple[Tensor, ...] | int, **options: Any) -> None:
    """Launch a kernel. What was compiled once is launched again without asking Triton what the arguments are.

    `kernel[grid](...)` looks at every argument anew, which takes as long as a small kernel runs; to launch one that is
    kept takes half of that or less.

    Args:
        kernel: what `jit` made.
        grid: number of programs, in up to three dimensions.
        arguments: tensors on the current device, named tuples of them, and whole numbers; all that are not constants.
            The first tensor has the dtype that all floating ones have. Numbers stay out of the tuples: Triton knows
            those that it need not compile anew for by the names of a kernel's parameters.
        options: the kernel's constants, which are its last parameters, and Triton's options for compiling it.
    """
    if not isinstance(kernel, triton.JITFunction):  # it is interpreted
        kernel[grid](*arguments, **options)
        return
    # What Triton compiles a kernel for: the dtype, whether all memory is aligned, numbers that are 1, multiples of 16,
    # or larger than an int32. `id`, because the hash of a kernel is that of its source.
    addresses, numbers = 0, []
    for argument in arguments:
        if isinstance(argument, int):
            numbers.append((argument == 1, argument % 16 == 0, argument > 0x7FFFFFFF))
        elif isinstance(argument, tuple):
            for tensor in argument:
                addresses |= tensor.data_ptr()
        else:
            addresses |= argument.data_ptr()
    first = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
    if addresses % 16 or not isinstance(first, Tensor):
        kernel[grid](*arguments, **options)
        return
    key = (id(kernel), first.device, first.dtype, *numbers, *options.values())
    kept = _kept.get(key)
    if kept is None:
        constants = [options[name] for name in kernel.arg_names[len(arguments) :]]
        _kept[key] = kernel[grid](*arguments, **options), constants
    else:
        compiled, constants = kept
        compiled[(*grid, 1, 1)[:3]](*arguments, *constants)


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
