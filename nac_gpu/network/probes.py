"""Copies of models and inputs for the copies test: in a wider dtype, and with random values in place of constants."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nac_gpu.network.deferred import after, loaded
from nac_gpu.network.running import ExampleInputs
from nac_gpu.network.state import tensors


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in another dtype, complex ones in the complex dtype of the same precision, others unchanged."""
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.to(dtype.to_complex() if value.is_complex() else dtype)


def converted(model: nn.Module, example_inputs: ExampleInputs, dtype: torch.dtype) -> tuple[nn.Module, ExampleInputs]:
    """A copy of the model, and its inputs, in another floating dtype."""
    return copy.deepcopy(model)._apply(lambda value: in_dtype(value, dtype)), pytree.tree_map(
        lambda value: in_dtype(value, dtype), example_inputs
    )


#: The largest difference between outputs that rounding explains, relative to the largest output.
SAME = {torch.float32: 1e-5, torch.float64: 1e-8}


def probed(
    model: nn.Module, example_inputs: ExampleInputs, dtype: torch.dtype, seed: int = 0
) -> tuple[dict[str, Tensor], ExampleInputs]:
    """A model's tensors by name, and its inputs, in a floating dtype, with random values in place of constants.

    The copies test compares networks on these tensors, in float32 first: that takes half the time, and an error too
    small for float32 does not matter in the user's network either. Only if the difference may be more than rounding is
    the test repeated in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = {name for name, _ in model.named_parameters()}
    state = {
        name: lively(in_dtype(value, dtype), generator) if name in parameters else in_dtype(value, dtype)
        for name, value in tensors(model).items()
    }
    return state, pytree.tree_map(lambda value: lively(in_dtype(value, dtype), generator), example_inputs)


def lively(tensor: Any, generator: torch.Generator) -> Any:
    """The tensor; random numbers of the same shape if all its values are equal.

    Zero-initialised heads, layer scales of 1e-6 and all-zero inputs would hide the effect of merging, and the copies
    test would always pass.
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
        return torch.randn(like.shape, generator=own, dtype=double).to(like) / fan_in**0.5

    return after(tensor, drawn)


def _constant(tensor: Tensor) -> bool:
    flat = tensor.flatten()
    return bool(flat[0] == flat[-1]) and bool((flat == flat[0]).all())
