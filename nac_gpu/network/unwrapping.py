"""The network itself: without the wrappers of training, and with the weights that it really computes with."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def unwrapped(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The module inside DistributedDataParallel, DataParallel or torch.compile, and what was taken off."""
    said = []
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        elif type(model).__name__ == "OptimizedModule":  # of torch.compile
            inner = model._orig_mod
        else:
            return model, tuple(said)
        assert isinstance(inner, nn.Module), "a wrapper holds a module"
        said.append(f"{type(model).__name__} was taken off; wrap the smaller network again")
        model = inner


def computed(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The network with plain weights in place of parametrised, normalised or masked ones, and what was changed.

    Args:
        model: left as it is; given back itself if there is nothing to do.
    """
    if not any(is_computed(module) for module in model.modules()):
        return model, ()
    memo: dict[int, Tensor] = {}  # tensors that hooks computed cannot be copied with their history
    for value in (value for module in model.modules() for value in vars(module).values()):
        if isinstance(value, Tensor) and value.grad_fn is not None:
            memo[id(value)] = value.detach().clone()
    model = copy.deepcopy(model, memo)
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
    """Put computed tensors in place of parametrised ones, whose names are given back.

    PyTorch's own way takes the tensors out of the class that parametrisation made, which the original shares.
    """
    parametrizations = module._modules.pop("parametrizations")
    assert isinstance(parametrizations, nn.ModuleDict), "torch keeps them so"
    parametrizations.eval()  # a power iteration more would change the weight
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
