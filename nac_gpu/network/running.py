"""Runs a model on example inputs: in eval mode, without side effects, with fused operations decomposed if needed."""

import contextlib
import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]


def arguments(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a tensor is the only one, a sequence is positional, a mapping is by keyword."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return tuple(example_inputs), {}


def call(model: nn.Module, example_inputs: ExampleInputs) -> Any:
    """Run one forward pass on copies of the inputs, which the model's code may write to; see `arguments`."""
    return call_on(model, own_inputs(example_inputs))


def without_cache(model: nn.Module, inputs: ExampleInputs) -> ExampleInputs:
    """The inputs with `use_cache=False`, where the model's forward has such an argument and it is not given.

    Language models return the keys and values of all layers otherwise, which takes memory and is of no use here.
    """
    try:
        known = list(inspect.signature(model.forward).parameters)
    except (TypeError, ValueError):
        return inputs
    if "use_cache" not in known:
        return inputs
    if isinstance(inputs, Tensor):
        inputs = {known[0]: inputs}
    return {"use_cache": False, **inputs} if isinstance(inputs, Mapping) else inputs


def call_on(model: nn.Module, inputs: ExampleInputs) -> Any:
    """Run one forward pass on these very inputs."""
    positional, named = arguments(inputs)
    return model(*positional, **named)


def own_inputs(example_inputs: ExampleInputs) -> ExampleInputs:
    """Copies of inputs. Tensors keep their place in the graph of gradients, and their strides.

    What is no tensor, such as a cache that the model appends to, is copied if it can be.
    """
    copies: dict[int, Any] = {}  # the same tensor given twice stays the same tensor, as self-attention expects

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in copies:
                copies[id(value)] = value.clone()
            return copies[id(value)]
        try:
            return value if callable(value) else copy.deepcopy(value, copies)
        except Exception:  # an object may raise anything when it is copied
            return value

    return pytree.tree_map(copied, example_inputs)


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter; the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def describe(example_inputs: ExampleInputs) -> str:
    """Shapes and dtypes of the tensors, and all other values, for messages."""
    return ", ".join(
        f"{tuple(value.shape)} {value.dtype}".replace("torch.", "") if isinstance(value, Tensor) else repr(value)
        for value in pytree.tree_leaves(example_inputs)
    )


@contextlib.contextmanager
def modes_kept(model: nn.Module | None) -> Iterator[None]:
    """Restore the mode (training or eval) of every module at the end, even after an exception."""
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def set_mode_again(module: nn.Module) -> None:
    """Set each module's mode to what it is, because models drop then what they cached of their weights (LeViT, say)."""
    if len({part.training for part in module.modules()}) == 1:
        module.train(module.training)
        return
    for part in module.children():
        set_mode_again(part)


@contextlib.contextmanager
def evaluating(model: nn.Module, *, auxiliary: bool = False, fused: bool = False) -> Iterator[None]:
    """Eval mode without gradients; the mode of every module and the random state are always restored.

    Args:
        model: the model.
        auxiliary: set training mode on modules that contain other modules. Layers that only run in training (auxiliary
            heads) then run, while dropout and normalisations, which contain none, stay in eval mode.
        fused: keep PyTorch's fused fast path for transformer layers, as in normal use. Recording needs it off, because
            it hides the single operations.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with modes_kept(model):
        model.eval()
        if auxiliary:
            for module in model.modules():
                module.training = any(True for _ in module.children())
        try:
            torch.backends.mha.set_fastpath_enabled(fast_path and fused)
            with torch.no_grad(), torch.random.fork_rng(devices):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


@contextlib.contextmanager
def in_small_operations(model: nn.Module) -> Iterator[None]:
    """Run attention and recurrent layers as separate matrix products instead of one fused operation."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    on_cuda = device_of(model).type == "cuda"
    before = torch._C._get_mkldnn_enabled(), torch.backends.cudnn.enabled
    try:
        if recurrent:
            torch._C._set_mkldnn_enabled(False)
            torch.backends.cudnn.enabled = False
        # Without cuDNN, CUDA still fuses a recurrent step into one operation; PyTorch's Python decomposition does not.
        plain = enable_python_dispatcher() if recurrent and on_cuda else contextlib.nullcontext()
        with sdpa_kernel(SDPBackend.MATH), plain:
            yield
    finally:
        torch._C._set_mkldnn_enabled(before[0])
        torch.backends.cudnn.enabled = before[1]
