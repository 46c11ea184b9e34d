"""Models that are larger than the memory: the tensors stay in their files until an operation reads them."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from nac_gpu.deferred import Deferred
from nac_gpu.rebuild import rebuild, tensors
from nac_gpu.shards import Entry, Weights, entries
from nac_gpu.unwrap import is_computed, unwrapped


def open_model(factory: Callable[[], nn.Module], weights: Weights, *, device: torch.device | str = "cpu") -> nn.Module:
    """A model whose weights stay in safetensors files: each is read when an operation needs it, and dropped again.

    `nac_gpu.plan`, `nac_gpu.compress` and `nac_gpu.cost` take such a model, `compress` gives one, and `nac_gpu.save`
    writes it tensor by tensor, so that what needs memory is the largest layers and what clustering one group takes, not
    the model. The files are read about seven times. Neurons are compared by their weights (`calibration="none"`).

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
    found = entries(weights)
    model, _ = unwrapped(built_without_parameters(factory))
    computed = [name for name, module in model.named_modules() if is_computed(module)]
    if computed:
        raise ValueError(
            f"the weights of {computed[0] or 'the model'} are computed (by a parametrisation, a norm or a mask), "
            "expected plain ones; compress a model that is in memory, or save it without them first"
        )
    return rebuild(model, _opened(model, found, device)).eval()


def is_open(model: nn.Module) -> bool:
    """Whether tensors of a model are in files."""
    return any(isinstance(tensor, Deferred) for tensor in tensors(model).values())


def built_without_parameters(factory: Callable[[], nn.Module]) -> nn.Module:
    """What the factory builds, with the parameters on the meta device, and other tensors with their values.

    Raises:
        TypeError: that is not a module.
    """
    model = None
    with _parameters_on_meta():
        with contextlib.suppress(RuntimeError), _EmptyOnMeta():
            model = factory()
        if model is None or (isinstance(model, nn.Module) and _lost(model)):
            model = factory()  # it writes buffers into empty memory, so memory must be had
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a factory that builds a module, it gave {type(model).__name__}")
    return model


def _lost(model: nn.Module) -> list[str]:
    """Buffers without values that no file holds."""
    kept = set(model.state_dict())
    return [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in kept]


class _EmptyOnMeta(TorchFunctionMode):
    """Memory without values is not needed yet: parameters begin as `torch.empty`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None and kwargs.get("out") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters are on the meta device as soon as a module has them; other tensors are where they are."""

    def on_meta(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # as it is, so that tied ones stay one
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(on_meta)  # pyright: ignore[reportArgumentType]
    try:
        with warnings.catch_warnings():  # factories may load weights that nobody wants here
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter.*")
            yield
    finally:
        handle.remove()


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
