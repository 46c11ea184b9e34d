"""Models larger than the memory: each tensor stays in its file until an operation reads it."""

import contextlib
import ctypes
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakTensorKeyDictionary

from nac_gpu.files.shards import Entry, Weights, entries
from nac_gpu.network.copying import rebuild
from nac_gpu.network.unwrapping import is_computed, unwrapped

_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_LARGE = 2**20  # bytes


def open_model(factory: Callable[[], nn.Module], weights: Weights, *, device: torch.device | str = "cpu") -> nn.Module:
    """A model whose weights stay in safetensors files: each is read when an operation needs it, and then dropped.

    `nac_gpu.plan`, `nac_gpu.compress` and `nac_gpu.cost` accept such a model, `compress` returns one, and
    `nac_gpu.save` writes it tensor by tensor. So the memory has to hold only the largest layers and the clustering of
    one group, not the model. The files are read several times. Neurons are compared by their weights
    (`calibration="none"`).

    With glibc this sets `M_MMAP_THRESHOLD` of the process to 1 MiB, so that large blocks of memory are returned to the
    system as soon as they are free.

    Args:
        factory: builds the architecture. Memory is used for at most one parameter at a time, and for buffers.
        weights: a safetensors file; a folder of them, such as Hugging Face's with `model.safetensors.index.json`; or
            several files. They must not change while the model is in use.
        device: where operations run.

    Returns:
        The model in eval mode, with the dtypes of the files. It cannot be trained.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated or damaged; a tensor is only in the factory's model or only in the files, or
            their shapes differ; the factory computes weights (parametrisations); a buffer has no values.
        TypeError: the factory does not build a module.

    >>> def build():
    ...     return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> from safetensors.torch import save_model
    >>> save_model(build(), "model.safetensors")
    >>> model = nac_gpu.open_model(build, "model.safetensors")
    >>> nac_gpu.plan(model, torch.zeros(1, 8), width=0.25).widths
    {'0': 8}
    """
    device = torch.device(device)
    _return_large_blocks()
    found = entries(weights)
    model, _ = unwrapped(built_without_parameters(factory))
    computed = [name for name, module in model.named_modules() if is_computed(module)]
    if computed:
        raise ValueError(
            f"the weights of {computed[0] or 'the model'} are computed (by a parametrisation, a norm or a mask), "
            "expected plain ones; compress a model that is in memory, or save it without them first"
        )
    return rebuild(model, _opened(model, found, device)).eval()


def built_without_parameters(factory: Callable[[], nn.Module]) -> nn.Module:
    """The factory's module, with parameters on the meta device and other tensors with their values.

    If the factory needs the values of parameters, it is called again with real parameters.

    Raises:
        TypeError: the factory does not build a module.
    """
    model = None
    with contextlib.suppress(Exception), _parameters_on_meta():  # an error of the factory itself is raised again below
        model = factory()
    return model if isinstance(model, nn.Module) and not _lost(model) else built(factory)


def built(factory: Callable[[], nn.Module]) -> nn.Module:
    """The factory's module.

    Raises:
        TypeError: the factory does not build a module.
    """
    model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"the factory returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def _lost(model: nn.Module) -> bool:
    """Whether tensors without values exist that are not in the state dict, so that no file holds them."""
    kept = set(model.state_dict())
    if any(buffer.is_meta and name not in kept for name, buffer in model.named_buffers()):
        return True
    own = {id(parameter) for parameter in model.parameters()}
    tensors = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    return any(tensor.is_meta and id(tensor) not in own for tensor in tensors)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device when a module registers it; other tensors are not affected."""
    known = WeakTensorKeyDictionary()  # tied parameters stay tied

    def on_meta(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # None leaves the parameter unchanged
        if parameter not in known:
            known[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        return known[parameter]

    handle = register_module_parameter_registration_hook(on_meta)  # pyright: ignore[reportArgumentType]
    try:
        with warnings.catch_warnings():  # factories may load weights, which have no effect here
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
            yield
    finally:
        handle.remove()


def _return_large_blocks() -> None:
    """Make glibc return large blocks of memory to the system as soon as they are free, for the whole process.

    By default glibc starts to put them on its heap after a while, where small allocations between them cause
    fragmentation: the heap grew with the number of layers.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def _opened(model: nn.Module, found: dict[str, Entry], device: torch.device) -> dict[str, Tensor]:
    """For each name of `tensors(model)` the tensor in the files, or the model's own if it is not in the state dict.

    Raises:
        ValueError: as `open_model`.
    """
    names: dict[int, list[str]] = {}
    named: list[tuple[str, Any]] = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        names.setdefault(id(tensor), []).append(name)
    kept = set(model.state_dict())
    state: dict[str, Tensor] = {}
    missing: list[str] = []
    for tensor in dict.fromkeys(tensor for _, tensor in named):
        own = names[id(tensor)]
        entry = next((found[name] for name in own if name in found and name in kept), None)
        if entry is None and kept.isdisjoint(own):
            if tensor.is_meta:
                raise ValueError(f"the buffer {own[0]} has no values and is in no file; let the factory compute it")
            state[own[0]] = tensor.to(device)
        elif entry is None:
            missing.append(f"{own[0]} {tuple(tensor.shape)}")
        elif entry.shape != tuple(tensor.shape):
            raise ValueError(
                f"{own[0]} has the shape {entry.shape} in {entry.path}, but the factory's has {tuple(tensor.shape)}; "
                "give the factory of the model that was saved"
            )
        else:
            state[own[0]] = entry.deferred(device)
    known = {name for own in names.values() for name in own}
    unknown = [f"{name} {entry.shape} in {entry.path}" for name, entry in found.items() if name not in known]
    if missing or unknown:
        parts = []
        if missing:
            parts.append(f"the files lack {missing[0]}, the first of {len(missing)} tensors of the factory's model")
        if unknown:
            parts.append(f"the factory's model lacks {unknown[0]}, the first of {len(unknown)} tensors")
        raise ValueError(f"{'; '.join(parts)}; give all files, and the factory of the model that was saved")
    return state
