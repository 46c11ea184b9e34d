"""Models that are larger than the memory: the tensors stay in their files until an operation reads them."""

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
    """A model whose weights stay in safetensors files: each is read when an operation needs it, and dropped again.

    `nac_gpu.plan`, `nac_gpu.compress` and `nac_gpu.cost` take such a model, `compress` gives one, and `nac_gpu.save`
    writes it tensor by tensor, so that what needs memory is the largest layers and what clustering one group takes, not
    the model. The files are read several times. Neurons are compared by their weights (`calibration="none"`).

    With glibc, large blocks of memory are given back to the system as soon as they are free, in this process from now
    on (its `M_MMAP_THRESHOLD` is set to 1 MiB).

    Args:
        factory: builds the architecture. Its parameters get no memory, at most one at a time; other tensors do.
        weights: a safetensors file; a folder of them, as Hugging Face's with `model.safetensors.index.json`; or
            several files. They must stay as they are while the model is in use.
        device: where operations take place.

    Returns:
        The model in eval mode, with the dtypes of the files. It cannot be trained.

    Raises:
        FileNotFoundError: a file that is missing.
        ValueError: a file that is cut off or damaged; a tensor that only the factory or only the files have, or that
            have it in other shapes; weights that the factory computes (parametrisations); a buffer without values.
        TypeError: the factory does not build a module.
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
    """What the factory builds, with the parameters on the meta device, and other tensors with their values.

    A factory that needs its parameters' values, and what such a factory makes of them, gets memory for all of them.

    Raises:
        TypeError: that is not a module.
    """
    model = None
    with contextlib.suppress(Exception), _parameters_on_meta():  # without it, the same error comes again
        model = factory()
    if model is None or (isinstance(model, nn.Module) and _lost(model)):
        model = factory()
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a factory that builds a module, it gave {type(model).__name__}")
    return model


def _lost(model: nn.Module) -> bool:
    """Whether there are tensors without values that no file holds."""
    kept = set(model.state_dict())
    if any(buffer.is_meta and name not in kept for name, buffer in model.named_buffers()):
        return True
    own = {id(parameter) for parameter in model.parameters()}
    tensors = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    return any(tensor.is_meta and id(tensor) not in own for tensor in tensors)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters are on the meta device as soon as a module has them; other tensors are where they are."""
    known = WeakTensorKeyDictionary()  # one tensor under two names stays one

    def on_meta(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # as it is
        if parameter not in known:
            known[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        return known[parameter]

    handle = register_module_parameter_registration_hook(on_meta)  # pyright: ignore[reportArgumentType]
    try:
        with warnings.catch_warnings():  # factories may load weights that nobody wants here
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
            yield
    finally:
        handle.remove()


def _return_large_blocks() -> None:
    """Make glibc give large blocks of memory back as soon as they are free, in this process from now on.

    By default it puts them on its heap after a while, where small ones that stay in use settle between them: the heap
    grew with the number of layers.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def _opened(model: nn.Module, found: dict[str, Entry], device: torch.device) -> dict[str, Tensor]:
    """For each name of `tensors(model)` the tensor in the files, or the model's own where none belongs there.

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
