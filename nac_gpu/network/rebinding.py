"""Functions that hold on to a model: in a copy of the model, they hold on to the copy.

`copy.deepcopy` copies no functions. So a method that was replaced by a function which calls the old one, a hook that
uses other layers, or a weak reference to a parent module would still run, and write to, the original.
"""

import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

_OWN = frozenset({"_parameters", "_buffers", "_modules"})  # of every module, copied rightly
_CONTAINERS = (list, tuple, dict, OrderedDict)
_HOLDERS = frozenset({types.FunctionType, types.MethodType, functools.partial, weakref.ref, *_CONTAINERS})


def rebind(copies: dict[int, Any], model: nn.Module) -> None:
    """Exchange what the functions of a copied model hold on to, in place.

    Considered are functions, methods, partial functions and weak references among the attributes and hooks of modules,
    and what these functions refer to: their closures, default values and global names. What they reach through other
    objects is not.

    Args:
        copies: of modules and tensors, by the `id` of the original, as `copy.deepcopy` fills its memo.
        model: the copy.
    """
    rebinding = _Rebinding(copies)
    for module in model.modules():
        own = vars(module)
        for name, value in list(own.items()):
            if type(value) in _HOLDERS and value and name not in _OWN:
                new = rebinding.of(value)
                if new is not value:
                    own[name] = new


class _Globals(dict[str, Any]):
    """Names that functions find in place of global ones; all others are those of their Python module."""

    def __init__(self, module: dict[str, Any]) -> None:
        super().__init__()
        self.module = module

    def __missing__(self, name: str) -> Any:
        return self.module[name]


class _Rebinding:
    def __init__(self, copies: dict[int, Any]) -> None:
        self._copies = copies
        self._new: dict[int, tuple[Any, Any]] = {}  # old and new, by the id of the old
        self._free: dict[int, Any] = {}  # what holds on to nothing of the original, by its id
        self._cells: dict[int, types.CellType] = {}
        self._scopes: dict[int, _Globals] = {}

    def of(self, value: Any) -> Any:
        """What takes the place of a value in the copy; the same value if it holds on to nothing of the original."""
        if isinstance(value, nn.Module | Tensor):
            return self._copies.get(id(value), value)
        if type(value) not in _HOLDERS or not self._holds(value):
            return value
        if id(value) not in self._new:
            if isinstance(value, types.FunctionType):
                return self._function(value)
            self._new[id(value)] = value, value  # ends the search in what contains itself
            self._new[id(value)] = value, self._made(value)
        return self._new[id(value)][1]

    def _holds(self, value: Any) -> bool:
        """Whether something of the original can be reached."""
        seen, waiting = {}, [value]
        while waiting:
            one = waiting.pop()
            if id(one) in self._copies and isinstance(one, nn.Module | Tensor):
                return True
            if type(one) in _HOLDERS and id(one) not in self._free and id(one) not in seen:
                seen[id(one)] = one
                waiting.extend(_parts(one))
        self._free |= seen
        return False

    def _made(self, value: Any) -> Any:
        if isinstance(value, types.MethodType):
            return types.MethodType(self.of(value.__func__), self.of(value.__self__))
        if isinstance(value, functools.partial):
            return functools.partial(self.of(value.func), *self.of(value.args), **self.of(value.keywords))
        if isinstance(value, weakref.ref):
            return weakref.ref(self.of(value()))
        if isinstance(value, dict):
            return type(value)((key, self.of(item)) for key, item in value.items())
        return type(value)(self.of(item) for item in value)

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """A function with the same code."""
        held = {name: found for name, found in _global_values(function) if self._holds(found)}
        scope = self._scope(function.__globals__) if held else function.__globals__
        cells = [self._cells.setdefault(id(cell), types.CellType()) for cell in function.__closure__ or ()]
        new = types.FunctionType(function.__code__, scope, function.__name__, None, tuple(cells) or None)
        self._new[id(function)] = function, new  # before what it refers to, which may be itself
        for cell, copied in zip(function.__closure__ or (), cells, strict=True):
            for value in _content(cell):
                copied.cell_contents = self.of(value)
        for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
            setattr(new, name, getattr(function, name))
        new.__defaults__, new.__kwdefaults__ = self.of(function.__defaults__), self.of(function.__kwdefaults__)
        vars(new).update({name: self.of(value) for name, value in vars(function).items()})
        scope.update({name: self.of(value) for name, value in held.items()})
        return new

    def _scope(self, module: dict[str, Any]) -> _Globals:
        return self._scopes.setdefault(id(module), _Globals(module))


def _parts(value: Any) -> Iterator[Any]:
    """What a function, a weak reference or a container refers to."""
    if isinstance(value, types.FunctionType):
        for cell in value.__closure__ or ():
            yield from _content(cell)
        yield from (value.__defaults__, value.__kwdefaults__, vars(value))
        yield from (found for _, found in _global_values(value))
    elif isinstance(value, types.MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, weakref.ref):
        yield value()
    else:
        yield from value.values() if isinstance(value, dict) else value


def _content(cell: types.CellType) -> Iterator[Any]:
    try:
        yield cell.cell_contents
    except ValueError:  # it is still empty
        return


def _global_values(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Global names that a function mentions, and what they mean: models, tensors, methods, functions of its module."""
    scope = function.__globals__
    for name in set(_mentioned(function.__code__)):
        try:
            value = scope[name]
        except KeyError:  # an attribute, or a built-in function
            continue
        of_module = isinstance(value, types.FunctionType) and _module(value.__globals__) is _module(scope)
        if of_module or isinstance(value, nn.Module | Tensor | types.MethodType | functools.partial):
            yield name, value


def _module(scope: dict[str, Any]) -> dict[str, Any]:
    return _module(scope.module) if isinstance(scope, _Globals) else scope


def _mentioned(code: types.CodeType) -> Iterator[str]:
    """Names that a function's code mentions, those of functions inside of it included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _mentioned(constant)
