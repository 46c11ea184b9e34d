"""Checks whether a model and its weights can be compressed, with reasons if not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_QUANTISED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse.quantized")
_SCRIPTED = "it is inside a ScriptModule, whose code is compiled: script the smaller model instead"


def check_model(model: Any) -> None:
    """Check that the user gave a module whose code can be recorded and whose tensors can be replaced.

    Raises:
        TypeError: something else than a module, or a module of a kind that cannot be compressed: a ScriptModule,
            uninitialised parameters, FullyShardedDataParallel.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {_described(model)}, expected a torch.nn.Module{_remedy(model)}")
    if isinstance(model, torch.jit.ScriptModule):
        name = getattr(model, "original_name", type(model).__name__)
        raise TypeError(
            f"model is a ScriptModule ({name}), whose compiled code cannot be recorded; compress the Python module "
            "that it was made from, and script the smaller one"
        )
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TypeError(
                f"{name or 'the model'} is in FullyShardedDataParallel, which keeps its parameters flat; compress the "
                "module without it, or divide the parameters with torch.distributed.fsdp.fully_shard"
            )
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for tensor, value in own:
            if is_lazy(value):
                raise TypeError(
                    f"{name + '.' if name else ''}{tensor} has no shape yet, because {type(module).__name__} is "
                    "initialised by its first call; call the model once before"
                )


def _described(model: object) -> str:
    if isinstance(model, type):
        return f"the class {model.__name__}"
    name = getattr(model, "__name__", None)
    if callable(model) and isinstance(name, str):
        return f"the function {name}"
    return "None" if model is None else f"of the type {type(model).__name__}"


def _remedy(model: object) -> str:
    """What to do instead, if that is known."""
    if isinstance(model, type) and issubclass(model, nn.Module):
        return f"; make one: {model.__name__}(...)"
    if isinstance(model, torch.export.ExportedProgram):
        return "; use its module(): program.module()"
    if isinstance(model, Mapping):
        return "; build the module and load these tensors: module.load_state_dict(...)"
    if isinstance(model, str | Path):
        return "; load it first"
    if callable(model):
        return "; put its layers and its code into a class with forward"
    return ""


def unrecorded(model: nn.Module) -> list[tuple[str, int, str]]:
    """Layers that have neurons, but no floating weights to compress: name, number of neurons, and the reason."""
    found = []
    for name, module in model.named_modules():
        size = getattr(module, "out_features", getattr(module, "out_channels", None))
        if type(module).__module__.startswith(_QUANTISED) and isinstance(size, int):
            found.append((name, size, "it is quantised: compress the model before, and quantise the smaller one"))
    return found


def reason_inside(model: nn.Module, layer: str) -> str | None:
    """Why a layer's pass cannot be recorded, if it is inside a module with compiled code."""
    parts = layer.split(".")
    modules = dict(model.named_modules())
    around = (modules.get(".".join(parts[:length])) for length in range(1, len(parts) + 1))
    return _SCRIPTED if any(isinstance(module, torch.jit.ScriptModule) for module in around) else None


def check_weights(model: nn.Module) -> None:
    """Check that every parameter is floating and finite, and so are the statistics of normalisations.

    Otherwise distances between neurons have no meaning, or a merged neuron would not be finite.

    Complex parameters are let through, too: the neurons that they make or read are left alone.

    Raises:
        TypeError: integer or sparse parameters, naming the first.
        ValueError: NaN or infinity, or parameters without values, naming the first.
    """
    for name, parameter in model.named_parameters():
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise TypeError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}, expected a floating type; "
                "compress the model before it is quantised, or convert it"
            )
        if parameter.layout != torch.strided:
            layout = str(parameter.layout).removeprefix("torch.")
            raise TypeError(f"{name} has the layout {layout}, expected a dense tensor; use {name}.to_dense()")
        if parameter.is_meta:
            raise ValueError(
                f"{name} is on the meta device and has no values, expected trained weights; load them, or use "
                "nac_gpu.open_model if they do not fit into memory"
            )
        _check_finite(name, parameter, "weights")
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")) and buffer.layout == torch.strided and not buffer.is_meta:
            _check_finite(name, buffer, "statistics")


def _check_finite(name: str, tensor: Tensor, what: str) -> None:
    # The sum takes one pass and is not finite if any value is not. But a sum of finite values may overflow, so a sum
    # that is not finite is followed by an exact check.
    if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{name} has {bad} values that are NaN or infinite, expected finite {what}; "
            "the training that made them has diverged, take an earlier checkpoint"
        )
