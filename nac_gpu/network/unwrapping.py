"""Removes training wrappers from a model, and replaces parametrised weights by the values that it computes with."""

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from nac_gpu.network.copying import copied


def unwrapped(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The module inside DistributedDataParallel, DataParallel or torch.compile, and a line for each wrapper removed."""
    said = []
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        elif type(model).__name__ == "OptimizedModule":  # from torch.compile
            inner = model._orig_mod
        else:
            return model, tuple(said)
        assert isinstance(inner, nn.Module), "a wrapper holds a module"
        said.append(f"{type(model).__name__} was taken off; wrap the smaller network again")
        model = inner


def computed(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """Replace parametrised, normalised or masked weights by plain ones.

    Args:
        model: not changed.

    Returns:
        A copy with plain weights, or the model itself if all its weights are plain; and a line for each change.
    """
    if not any(is_computed(module) for module in model.modules()):
        return model, ()
    model = copied(model)
    said = []
    for name, module in model.named_modules():
        own = f"{name}." if name else ""
        if parametrize.is_parametrized(module):
            said += [f"{own}{tensor}: {_REMOVED}" for tensor in _remove_parametrizations(module)]
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
                said.append(f"{own}{hook._tensor_name}: its mask was removed, its zeros stay")
            elif isinstance(hook, WeightNorm | SpectralNorm):
                with torch.no_grad():
                    hook.remove(module)
                del module._forward_pre_hooks[key]
                said.append(f"{own}{hook.name}: its {type(hook).__name__} was removed, the computed tensor stays")
    return model, tuple(said)


_REMOVED = "its parametrisation was removed, the computed tensor stays"


def _remove_parametrizations(module: nn.Module) -> list[str]:
    """Replace parametrised tensors by their computed values, and return their names.

    PyTorch's `remove_parametrizations` changes the class that parametrisation created, which the original shares.
    """
    parametrizations = module._modules.pop("parametrizations")
    assert isinstance(parametrizations, nn.ModuleDict), "torch stores parametrisations in a ModuleDict"
    parametrizations.eval()  # in training mode, spectral norm would run another power iteration and change the weight
    values = {}
    for name, chain in parametrizations.items():
        with torch.no_grad():
            trained = any(p.requires_grad for p in chain.parameters())
            values[name] = nn.Parameter(chain().clone(), requires_grad=trained)
    module.__class__ = type(module).__bases__[0]
    for name, value in values.items():
        module.register_parameter(name, value)
    return list(values)


def is_computed(module: nn.Module) -> bool:
    """Whether a module's own weights are parametrised, normalised or masked."""
    hooks = module._forward_pre_hooks.values()
    return parametrize.is_parametrized(module) or any(
        isinstance(hook, prune.BasePruningMethod | WeightNorm | SpectralNorm) for hook in hooks
    )
