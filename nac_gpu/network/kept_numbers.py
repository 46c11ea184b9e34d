"""Whole numbers that modules keep in attributes, in containers and in configurations, by their paths.

The path of a number is the name of the attribute, followed by what leads to the number inside of it, joined by dots:
`hidden`, `sizes.1` (item 1 of a sequence), `options.dim` (an entry of a dictionary, a field of an object).
"""

import argparse
import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from numbers import Integral
from types import SimpleNamespace
from typing import Any

from torch import nn

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_CONFIGURATION = re.compile(r"^(config|conf|cfg|args|opts?|options|hparams|params|settings)$")
_DEEPEST = 3  # containers inside each other
_LONGEST = 64  # items of a container; longer ones hold data
_OF_ATTENTION = frozenset({"embed_dim", "num_heads", "head_dim", "kdim", "vdim"})


def numbers_of(module: nn.Module) -> dict[str, int]:
    """The whole numbers above 1 that a module keeps, by their paths.

    Configurations of Hugging Face are omitted, because many modules share them.
    """
    found = {}
    for name, value in vars(module).items():
        if name not in _OF_EVERY_MODULE and "." not in name and (_is_whole(value) or not name.startswith("_")):
            found.update(_numbers(name, value, _CONFIGURATION.match(name) is not None, _DEEPEST))
    return found


def number_at(module: nn.Module, path: str) -> int | None:
    """The whole number at a path; None if there is none."""
    value: Any = module
    for key in path.split("."):
        found = _entry(value, key)
        if found is None:
            return None
        value = found[1]
    return int(value) if _is_whole(value) else None


def set_number(module: nn.Module, path: str, value: object) -> None:
    """Set what is at a path.

    Containers on the way are replaced by copies, because other modules may share them; configurations of Hugging Face
    are shared on purpose, and changed in place.
    """
    name, _, rest = path.partition(".")
    old = vars(module).get(name)
    setattr(module, name, _with(old, rest.split("."), value) if rest else _alike(old, value))


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _numbers(path: str, value: Any, configuration: bool, depth: int) -> Iterator[tuple[str, int]]:
    if _is_whole(value):
        if value > 1:
            yield path, int(value)
    elif depth:
        for key, item in _items(value, configuration):
            yield from _numbers(f"{path}.{key}", item, configuration, depth - 1)


def _items(value: Any, configuration: bool) -> list[tuple[str, Any]]:
    """The entries of a container or an object with fields, each with its part of the path."""
    entries: list[tuple[Any, Any]] = []
    if isinstance(value, list | tuple):
        entries = list(enumerate(value))
    elif isinstance(value, Mapping):
        entries = list(value.items())
    elif _has_fields(value) or (configuration and hasattr(value, "__dict__") and not callable(value)):
        entries = list(vars(value).items()) if not hasattr(value, "to_dict") else []
    if len(entries) > _LONGEST:
        return []
    return [(str(key), item) for key, item in entries if isinstance(key, int | str) and "." not in str(key)]


def _has_fields(value: object) -> bool:
    plain = isinstance(value, SimpleNamespace | argparse.Namespace) or dataclasses.is_dataclass(value)
    return plain and hasattr(value, "__dict__") and not isinstance(value, type)


def _entry(value: Any, key: str) -> tuple[Any, Any] | None:
    """The key, in its own type, and the value of an entry; None if there is none."""
    if isinstance(value, list | tuple):
        place = int(key) if key.isdecimal() else len(value)
        return (place, value[place]) if place < len(value) else None
    entries = value.items() if isinstance(value, Mapping) else getattr(value, "__dict__", {}).items()
    return next(((own, item) for own, item in entries if str(own) == key), None)


def _with(holder: Any, keys: list[str], value: object) -> Any:
    """A copy of a container in which another value is at the end of a path; or the same configuration, changed."""
    if hasattr(holder, "to_dict") and not keys[1:]:
        setattr(holder, keys[0], value)
        return holder
    found = _entry(holder, keys[0])
    assert found is not None, "the path leads to a number"
    key, old = found
    new = _with(old, keys[1:], value) if keys[1:] else _alike(old, value)
    if isinstance(holder, tuple):
        kind: Any = type(holder)
        items = [new if place == key else item for place, item in enumerate(holder)]
        return kind(*items) if hasattr(holder, "_fields") else kind(items)
    changed = copy.copy(holder)
    if isinstance(holder, list | Mapping):
        changed[key] = new
    else:
        object.__setattr__(changed, key, new)  # a dataclass may be frozen
    return changed


def _alike(old: object, value: object) -> object:
    """The value in the type of the old one, where that is NumPy's."""
    if _is_whole(old) and isinstance(value, int) and not isinstance(old, int):
        kind: Any = type(old)
        return kind(value)
    return value


@contextlib.contextmanager
def reads_of(model: nn.Module) -> Iterator[set[tuple[str, str]]]:
    """Note which attributes are read: the set of (module, attribute) fills while the model runs.

    Args:
        model: the classes of its modules are exchanged until the end of the context, so it should be a copy.
    """
    found: set[tuple[str, str]] = set()
    before = []
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith("torch.nn") and next(module.parameters(), None) is not None:
            continue
        with contextlib.suppress(Exception):  # a class that cannot be derived from or exchanged
            module.__class__ = _noting(kind, name, found)
            before.append((module, kind))
    try:
        yield found
    finally:
        for module, kind in before:
            module.__class__ = kind


def _noting(kind: type[nn.Module], name: str, found: set[tuple[str, str]]) -> type[nn.Module]:
    """A class that behaves like another one, and notes which attributes of its object are read."""

    def getting(self: nn.Module, attribute: str) -> Any:
        found.add((name, attribute))
        return kind.__getattribute__(self, attribute)

    return type(kind.__name__, (kind,), {"__getattribute__": getting, "__module__": kind.__module__})


def own_sizes(module: nn.Module) -> frozenset[str]:
    """Attributes of a module that PyTorch's layers define, also where its class is derived from one of theirs.

    They follow the tensors of the layer (see `nac_gpu.network.layer_sizes`), or have nothing to do with them, as
    `kernel_size`.
    """
    if isinstance(module, nn.MultiheadAttention):
        return _OF_ATTENTION
    if is_transposed_linear(module):
        return frozenset({"nx", "nf"})
    if isinstance(module, nn.Unflatten):
        return frozenset({"dim"})  # it has no tensors: its sizes are the user's
    kinds = type(module).__mro__
    own = next((kind for kind in kinds if kind.__module__.startswith("torch.nn")), nn.Module)
    return frozenset(getattr(own, "__constants__", ()))


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether it is Hugging Face's linear layer with a transposed weight."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
