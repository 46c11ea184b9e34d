"""How a model is run on example inputs: in eval mode, unnoticed, in small operations, counted."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]


def arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor is the only argument, a sequence the arguments, a mapping the keyword arguments."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return tuple(example_inputs), {}


def call(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """One forward pass; see `arguments`."""
    positional, named = arguments(example_inputs)
    return model(*positional, **named)


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors of a value: in sequences, mappings, dataclasses and other objects."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
        for item in vars(value).values():
            yield from tensors_in(item)


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def describe(example_inputs: ExampleInputs) -> str:
    """Shapes and types of the tensors, and all other values, for people."""
    return ", ".join(
        f"{tuple(value.shape)} {value.dtype}".replace("torch.", "") if isinstance(value, Tensor) else repr(value)
        for value in pytree.tree_leaves(example_inputs)
    )


@contextlib.contextmanager
def evaluating(model: nn.Module, *, auxiliary: bool = False, fused: bool = False) -> Iterator[None]:
    """Eval mode without gradients; every module's mode and the random state are put back, whatever happens.

    Args:
        model: the model.
        auxiliary: let modules that only hold other modules believe that they are trained: layers run that run in
            training only (auxiliary heads), while dropout and normalisations still do what they do in eval mode.
        fused: leave PyTorch's fused path through transformer layers on, as it is in use; recording cannot see into it.
    """
    modes = [(module, module.training) for module in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        model.eval()
        if auxiliary:
            for module in model.modules():
                module.training = any(True for _ in module.children())
        torch.backends.mha.set_fastpath_enabled(fast_path and fused)
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def in_small_operations(model: nn.Module) -> Iterator[None]:
    """Attention and LSTM as the matrix products that they are, not as one operation."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    on_cuda = device_of(model).type == "cuda"
    before = torch._C._get_mkldnn_enabled(), torch.backends.cudnn.enabled
    try:
        if recurrent:
            torch._C._set_mkldnn_enabled(False)
            torch.backends.cudnn.enabled = False
        # Without cuDNN, CUDA still runs a recurrent step as one operation; PyTorch's code in Python does not.
        plain = enable_python_dispatcher() if recurrent and on_cuda else contextlib.nullcontext()
        with sdpa_kernel(SDPBackend.MATH), plain:
            yield
    finally:
        torch._C._set_mkldnn_enabled(before[0])
        torch.backends.cudnn.enabled = before[1]
