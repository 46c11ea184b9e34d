"""Models and inputs for the copies test: in one floating dtype, and with random values in place of constants."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from nac_gpu.network.deferred import after, loaded
from nac_gpu.network.precision import in_dtype
from nac_gpu.network.running import ExampleInputs, call, evaluating, in_small_operations
from nac_gpu.network.state import tensors

#: The largest difference between outputs that rounding explains, relative to the largest output.
SAME = {torch.float32: 1e-5, torch.float64: 1e-8}
#: Differences in float32 from which on float64 tells whether they are rounding, which seldom makes more.
_DOUBT = 16 * torch.finfo(torch.float32).eps
_WIDEST = 1e-4  # what float32 may make of it where an operation has no float64
_SPREAD = (
    0.1  # of parameters around a constant: little, because models take some of them as exponents, such as durations
)
_HALVES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Probe:
    """A model as the copies test runs it.

    Attributes:
        model: not changed, and not run.
        inputs: its inputs, in the dtype of the test.
        state: its tensors by name, the same.
        dtype: of all floating tensors, also of those that the model's code casts or makes; None for the model's own.
        tolerance: the largest difference between outputs that rounding explains, relative to the largest output.
    """

    model: nn.Module
    inputs: ExampleInputs
    state: Mapping[str, Tensor]
    dtype: torch.dtype | None
    tolerance: float

    @property
    def rounds(self) -> bool:
        """Whether a difference may be rounding, and a stricter probe would tell."""
        return self.dtype == torch.float32 and self.tolerance == _DOUBT

    def types(self) -> contextlib.AbstractContextManager[object]:
        """A context in which the model's code uses the dtype of the test in place of any other floating dtype."""
        return contextlib.nullcontext() if self.dtype is None else in_one_type(self.dtype)

    def training_error(self, network: nn.Module) -> str | None:
        """The error that a copy of the model raises in training mode, in one line; None if it raises none."""
        with evaluating(network), in_small_operations(network), self.types():
            network.train()
            try:
                call(network, self.inputs)
            except Exception as error:  # the user's code may raise anything
                return f"{type(error).__name__}: {error}"
        return None


def probes(model: nn.Module, example_inputs: ExampleInputs, seed: int = 0) -> Iterator[Probe]:
    """Stricter and stricter probes, then those for models that do not run in the dtypes before.

    float32 comes first, because it takes half the time, and an error too small for float32 does not matter in the
    user's network either; then float64. Where an operation has no float64, float32 may differ more. A model that runs
    in neither is tried in its own dtypes.
    """
    own = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    ladder = [(torch.float32, _DOUBT), (torch.float64, SAME[torch.float64]), (torch.float32, _WIDEST)]
    for dtype, tolerance in ladder[1:2] if torch.float64 in own else ladder:
        state, inputs = probed(model, example_inputs, dtype, seed)
        yield Probe(model, inputs, state, dtype, tolerance)
    if len(own) > 1 or own & set(_HALVES):
        state, inputs = probed(model, example_inputs, None, seed)
        yield Probe(model, inputs, state, None, max(_HALVES.get(dtype, _WIDEST) for dtype in own))


@contextlib.contextmanager
def in_one_type(dtype: torch.dtype) -> Iterator[None]:
    """Make code use one floating dtype in place of any other that it casts to or makes tensors of."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with _OneType(dtype):
            yield
    finally:
        torch.set_default_dtype(before)


class _OneType(TorchFunctionMode):
    """Replaces floating dtypes among the arguments of PyTorch's functions."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CASTS:
            return args[0].to(self._dtype, **kwargs)
        if func is not Tensor.view:  # which reads the same bits as another dtype
            args = tuple(map(self._wanted, args))
            kwargs = {name: self._wanted(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _wanted(self, value: Any) -> Any:
        if not isinstance(value, torch.dtype) or not (value.is_floating_point or value.is_complex):
            return value
        return self._dtype.to_complex() if value.is_complex else self._dtype


_CASTS = frozenset({Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16})


def probed(
    model: nn.Module, example_inputs: ExampleInputs, dtype: torch.dtype | None, seed: int = 0
) -> tuple[dict[str, Tensor], ExampleInputs]:
    """A model's tensors by name, and its inputs, in a floating dtype, with random values in place of constants.

    With None for the dtype, each tensor keeps its own.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = {name for name, _ in model.named_parameters()}
    state = {
        name: lively(in_dtype(value, dtype), generator, _SPREAD) if name in parameters else in_dtype(value, dtype)
        for name, value in tensors(model).items()
    }
    return state, pytree.tree_map(lambda value: lively(in_dtype(value, dtype), generator), example_inputs)


def lively(tensor: Any, generator: torch.Generator, spread: float | None = None) -> Any:
    """The tensor; random numbers of the same shape if all its values are equal.

    Zero-initialised heads, layer scales of 1e-6 and all-zero inputs would hide the effect of merging, and the copies
    test would always pass.

    Args:
        tensor: anything that is no floating or complex tensor stays as it is.
        generator: of the seed of the random numbers.
        spread: how far from the constant the numbers are; by default they are around zero, whatever it was.
    """
    if not isinstance(tensor, Tensor) or tensor.numel() < 2:
        return tensor
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    if not _constant(loaded(tensor)):
        return tensor
    fan_in = math.prod(tensor.shape[1:])
    seed = int(torch.randint(2**62, (), generator=generator))

    def drawn(like: Tensor) -> Tensor:
        own = torch.Generator().manual_seed(seed)
        double = torch.complex128 if like.is_complex() else torch.float64
        noise = torch.randn(like.shape, generator=own, dtype=double).to(like) / fan_in**0.5
        return noise if spread is None else like + spread * noise

    return after(tensor, drawn)


def _constant(tensor: Tensor) -> bool:
    flat = tensor.flatten()
    return bool(flat[0] == flat[-1]) and bool((flat == flat[0]).all())
