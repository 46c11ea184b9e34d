"""What can be reached from a value: the tensors of outputs, of inputs, and of attributes."""

import gc
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Set, ValuesView
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
    elif isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | Set | deque | ValuesView | Iterator):
        yield from islice(value, _MOST)
    known = hasattr(value, "__dict__")
    if known:  # some mappings hold their values as attributes, too
        held = {id(item) for item in value.values()} if isinstance(value, Mapping) else set()
        yield from (item for item in vars(value).values() if id(item) not in held)
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            known = True
            yield getattr(value, name, None)
    if isinstance(value, Mapping | list | tuple | Set | deque | ValuesView | Iterator):
        return
    if isinstance(value, Iterable):
        yield from islice(value, _MOST)
    elif not known:
        yield from gc.get_referents(value)


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None
