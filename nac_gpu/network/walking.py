"""Networks run from one block to the next, in place of from their inputs each time.

Many networks are chains: what one module returns is what the next is called with. Groups are compensated in the order
of the pass, so most of what the networks compute on the way to a group is the same as for the group before. A `Walk`
keeps the values at one place of a chain for every batch, and goes on from there.

Which modules are a chain is found out by watching a pass, and then tested: modules run alone have to compute what they
compute in the network, and whatever else they are called with must not depend on the values in the chain. Where that
does not hold, there is no chain, and networks are run as a whole.
"""

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nac_gpu.network.ambient import cut_short
from nac_gpu.network.comparing import relative_error
from nac_gpu.network.running import ExampleInputs, call, own_inputs
from nac_gpu.network.watching import EnoughError, watching

_MOST_BYTES = 1 << 30  # of values that are kept
_SAME = 1e-4  # relative error of a chain run by itself: convolutions round differently from call to call


@dataclass(frozen=True)
class Place:
    """A place in front of a module of a chain.

    Attributes:
        chain: number of the chain.
        at: number of the module in it.
    """

    chain: int
    at: int


@dataclass(frozen=True)
class Chains:
    """Modules of a network that are called one after another.

    Attributes:
        modules: names of the modules of each chain, in the order of their calls.
    """

    modules: tuple[tuple[str, ...], ...] = ()

    def place(self, name: str) -> Place | None:
        """The place of the module in a chain that a module is, or is in; None if there is none."""
        for number, chain in enumerate(self.modules):
            for at, own in enumerate(chain):
                if name == own or name.startswith(f"{own}."):
                    return Place(number, at)
        return None

    def together(self, names: Sequence[str]) -> tuple[Place, Place] | None:
        """The first and the last place of these modules; None if they are not all in one chain."""
        found = [self.place(name) for name in names]
        places = [place for place in found if place is not None]
        if not places or len(places) < len(found) or len({place.chain for place in places}) > 1:
            return None
        order = sorted(places, key=lambda place: place.at)
        return order[0], order[-1]


@dataclass
class _Call:
    """One call of a module: what it was called with, and what it returned; order of its beginning and of its end."""

    name: str
    given: Tensor
    others: tuple[Any, ...]
    returned: Tensor | None = None
    versions: tuple[int, int] = (0, 0)  # of both tensors, which count what is written into them
    begin: int = 0
    end: int = 0
    more: bool = field(default=False)  # it is called more than once, or in another way


def find_chains(model: nn.Module, batch: ExampleInputs) -> Chains:
    """The chains of a network.

    Args:
        model: in eval mode, without gradients.
        batch: inputs.

    Raises:
        Exception: anything that the model's code raises.
    """
    calls = _calls(model, batch)
    chains: list[tuple[str, ...]] = []
    for names in _paths(calls):
        with contextlib.suppress(Exception):  # a module's code may not run alone
            if _holds(model, batch, names, calls):
                chains.append(names)
    return Chains(tuple(chains))


def _main(value: Any) -> Tensor | None:
    """What a module returned: a tensor, or the first of several values."""
    first = value[0] if isinstance(value, tuple | list) and value else value
    return first if isinstance(first, Tensor) else None


def _calls(model: nn.Module, batch: ExampleInputs) -> dict[str, _Call]:
    """The modules that are called once, with a tensor first, by name."""
    found: dict[str, _Call] = {}
    clock = 0

    def before(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            nonlocal clock
            clock += 1
            first = given[0] if given and isinstance(given[0], Tensor) else None
            if name in found or first is None or not first.is_floating_point():
                found[name] = _Call(name, torch.empty(0), (), more=True)
            else:
                found[name] = _Call(name, first, (given[1:], dict(named)), begin=clock)
                found[name].versions = first._version, 0

        return hook

    def after(name: str) -> Any:
        def hook(_: nn.Module, __: tuple[Any, ...], returned: Any) -> None:
            nonlocal clock
            clock += 1
            if name in found:
                one = found[name]
                one.end = clock
                one.returned = _main(returned)
                one.versions = one.versions[0], 0 if one.returned is None else one.returned._version

        return hook

    hooks = []
    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            hooks.append(module.register_forward_hook(after(name)))
    try:
        call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: one for name, one in found.items() if not one.more and one.returned is not None}


def _paths(calls: Mapping[str, _Call]) -> list[tuple[str, ...]]:
    """Modules that follow each other, those with most of the network first; none is in two paths, or in another."""
    order = sorted(calls.values(), key=lambda one: one.end)
    left = {one.name for one in order}
    inner = [one for one in order if not any(_within(other, one.name) for other in left - {one.name})]
    leaves = {one.name: sum(_within(leaf.name, one.name) for leaf in inner) for one in order}

    def worth(path: tuple[str, ...]) -> tuple[int, int]:
        """How much of the network it has, and in how many steps."""
        return sum(leaves[name] for name in path), len(path)

    paths = []
    while left:
        best: dict[str, tuple[str, ...]] = {}
        for one in order:
            if one.name not in left:
                continue
            before = [
                best[other.name]
                for other in order
                if other.name in best and other.end < one.begin and other.returned is one.given
                if other.versions[1] == one.versions[0]
            ]
            best[one.name] = (*max(before, key=worth, default=()), one.name)
        longest = max((path for path in best.values() if len(path) > 1), key=worth, default=())
        if not longest:
            break
        paths.append(longest)
        left = {name for name in left if not any(_within(name, own) or _within(own, name) for own in longest)}
    return paths


def _within(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.")


def _holds(model: nn.Module, batch: ExampleInputs, names: Sequence[str], calls: Mapping[str, _Call]) -> bool:
    """Whether modules are a chain: see the description of this module."""
    modules = dict(model.named_modules())
    first, last = _passed(model, batch, names, 1.0), _passed(model, batch, names, 1.25)
    if first is None or last is None or not all(map(_equal, first[1], last[1])):
        return False
    value = first[0]
    for name, others in zip(names, first[1], strict=True):
        found = _run(modules[name], value, others)
        if found is None:
            return False
        value = found
    end = calls[names[-1]].returned
    assert end is not None, "kept by _calls()"
    return value.shape == end.shape and relative_error([value], [first[2]]) < _SAME


def _equal(a: Any, b: Any) -> bool:
    one, other = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(one) == len(other) and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else type(x) is type(y)
        for x, y in zip(one, other, strict=True)
    )


def _copies_of(others: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies of positional and keyword arguments, as `own_inputs` makes them."""
    found: Any = own_inputs(others)
    return tuple(found[0]), dict(found[1])


def _run(module: nn.Module, value: Tensor, others: tuple[Any, ...]) -> Tensor | None:
    """What a module returns for copies of these arguments."""
    given, named = _copies_of(others)
    return _main(module(value.clone(), *given, **named))


def _passed(
    model: nn.Module, batch: ExampleInputs, names: Sequence[str], factor: float
) -> tuple[Tensor, list[tuple[Any, ...]], Tensor] | None:
    """What a chain is called with in a pass, what its modules are called with beside that, and what it returns.

    Args:
        model: the network.
        batch: its inputs.
        names: of the modules.
        factor: what the chain is called with is multiplied by this.
    """
    start: list[Tensor] = []
    others: dict[str, tuple[Any, ...]] = {}
    ends: list[Tensor] = []

    def before(name: str) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            others[name] = _copies_of((given[1:], named))
            if name != names[0]:
                return None
            start.append(given[0].clone())
            return (given[0] * factor, *given[1:]), named

        return hook

    def after(_: nn.Module, __: tuple[Any, ...], returned: Any) -> None:
        found = _main(returned)
        if found is not None:
            ends.append(found.clone())
        raise EnoughError

    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_pre_hook(before(name), with_kwargs=True) for name in names]
    hooks.append(modules[names[-1]].register_forward_hook(after))
    try:
        with cut_short():
            call(model, batch)
    except EnoughError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    if not start or not ends or len(others) < len(names):
        return None
    return start[0], [others[name] for name in names], ends[0]


class Walk:
    """The values of one network at a place of its chains, for each batch.

    Args:
        chains: of the network.
        batches: inputs.
    """

    def __init__(self, chains: Chains, batches: Sequence[ExampleInputs]) -> None:
        self._chains, self._batches = chains, batches
        self._values: dict[int, dict[Place, Tensor]] = {}
        self._others: dict[tuple[int, int], list[tuple[Any, ...]]] = {}

    def forget(self, before: Place | None) -> None:
        """Forget all values that a change of the network at this place has changed; None for a change anywhere."""
        for values in self._values.values():
            for place in list(values):
                if before is None or place.chain != before.chain or before.at < place.at:
                    del values[place]
        # what a chain is called with may come from another, as a decoder's from an encoder
        for key in [key for key in self._others if before is None or key[1] != before.chain]:
            del self._others[key]

    def look(
        self,
        model: nn.Module,
        number: int,
        places: tuple[Place, Place],
        calls: Mapping[str, int],
        take: Callable[[str, Tensor], None],
        *,
        onward: bool = False,
    ) -> bool:
        """Pass the inputs of layers to a function, as `nac_gpu.network.watching.look`.

        Args:
            model: the network as it is now.
            number: of the batch.
            places: the first and last place at which these layers are.
            calls: how many times each layer is called.
            take: is called with a layer's name and its input.
            onward: the network stays as it is, so that later places are reached from behind these modules.

        Returns:
            Whether all of these calls were seen.
        """
        modules = dict(model.named_modules())
        value = self._at(modules, model, number, places[0])
        if value is None:
            return False
        names, others = self._chains.modules[places[0].chain], self._others[number, places[0].chain]
        asked = dict.fromkeys(calls, sys.maxsize) if onward else calls  # they end with the last call that is asked for
        with watching(modules, asked, take) as watched:
            for at in range(places[0].at, places[1].at + 1):
                found = _run(modules[names[at]], value, others[at])
                assert found is not None, "tested by find_chains()"
                value = found
        if onward:
            self._keep(number, Place(places[1].chain, places[1].at + 1), value)
        return sum(asked.values()) - watched.missing == sum(calls.values())

    def _at(self, modules: Mapping[str, nn.Module], model: nn.Module, number: int, place: Place) -> Tensor | None:
        """The value at a place, which is kept."""
        names = self._chains.modules[place.chain]
        key = number, place.chain
        kept = self._values.setdefault(number, {})
        before = [known for known in kept if known.chain == place.chain and known.at <= place.at]
        if not before or key not in self._others:
            passed = _passed(model, self._batches[number], names, 1.0)
            if passed is None:
                return None
            self._others[key] = self._others.get(key, passed[1])
            start, value = Place(place.chain, 0), passed[0]
        else:
            start = max(before, key=lambda known: known.at)
            value = kept[start]
        for at in range(start.at, place.at):
            found = _run(modules[names[at]], value, self._others[key][at])
            if found is None:
                return None
            value = found
        for known in list(kept):
            if known.chain != place.chain or known.at < place.at:
                del kept[known]
        self._keep(number, place, value)
        return value

    def _keep(self, number: int, place: Place, value: Tensor) -> None:
        if value.numel() * value.element_size() * len(self._batches) <= _MOST_BYTES:
            self._values.setdefault(number, {})[place] = value
