"""What can be reached from a value: the tensors of outputs, of inputs, and of attributes."""

import contextlib
import gc
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_MOST = 10_000  # items of an iterator, which may have no end
_PLAIN = (int, str, bytes, type, ModuleType, nn.Module, torch.dtype, torch.device, torch.Generator, torch.Size)


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors that can be reached from a value; iterators in it are used up."""
    return (leaf for leaf in leaves_in(value) if isinstance(leaf, Tensor))


def leaves_in(value: object, *, use_up: bool = True) -> Iterator[Any]:
    """All tensors, arrays and real or complex numbers that can be reached from a value, however it holds them.

    Sequences, mappings, views of them, iterators, attributes, slots, closures, and what objects written in C refer to.
    Modules, classes and whole numbers are not entered.

    Args:
        value: anything.
        use_up: also go through iterators, which can be done only once.
    """
    seen: dict[int, object] = {}  # keeps the objects, so that no id is used twice

    def walk(value: object) -> Iterator[Any]:
        if isinstance(value, Tensor | np.ndarray | np.inexact | float | complex):
            yield value
        elif value is None or isinstance(value, _PLAIN) or id(value) in seen:
            return
        else:
            seen[id(value)] = value
            if not isinstance(value, Iterator) or use_up:
                for part in _parts(value):
                    yield from walk(part)

    return walk(value)


def _parts(value: object) -> Iterator[object]:
    """The parts of an object, in a fixed order where it has one."""
    if isinstance(value, FunctionType | MethodType):
        function: Any = value.__func__ if isinstance(value, MethodType) else value
        yield getattr(value, "__self__", None)
        yield function.__defaults__
        for cell in function.__closure__ or ():
            yield _content(cell)
        return
    if isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    slots = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    names = [name for own in slots for name in ((own,) if isinstance(own, str) else own)]
    held: set[int] = set()
    if isinstance(value, Iterable):
        # If attributes are known, what an object shows beside them may be computed, or fail.
        known = (hasattr(value, "__dict__") or bool(names)) and not isinstance(value, Iterator)
        with contextlib.suppress(Exception) if known else contextlib.nullcontext():
            for item in islice(value.values() if isinstance(value, Mapping) else value, _MOST):
                held.add(id(item))
                yield item
    # Some mappings hold their values as attributes, too.
    yield from (item for item in getattr(value, "__dict__", {}).values() if id(item) not in held)
    yield from (getattr(value, name, None) for name in names)
    if not isinstance(value, Iterable) and not hasattr(value, "__dict__") and not names:
        yield from gc.get_referents(value)


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None
