"""Everything that can be reached from what forward returns is output: it keeps its channels, and is compared."""

import collections
import collections.abc
import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import nac_gpu as nac
from nac_gpu.network.reaching import leaves_in, tensors_in

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass(slots=True)
class Slots:
    first: Tensor
    second: Tensor


class Own:
    """A container that is none of Python's: it has slots, a length and items."""

    __slots__ = ("_parts",)

    def __init__(self, *parts: Tensor) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, number: int) -> Tensor:
        return self._parts[number]


class Lazy:
    """Computes its items as they are asked for."""

    def __init__(self, *makers: Callable[[], Tensor]) -> None:
        self.makers = makers

    def __iter__(self) -> Iterator[Tensor]:
        return (make() for make in self.makers)


class Cache:
    """As a cache of Hugging Face: its items are made of attributes that not all of its layers have."""

    def __init__(self, *states: Tensor) -> None:
        self.layers = [types.SimpleNamespace(state=state) for state in states]

    def __iter__(self) -> Iterator[Tensor]:
        return (layer.keys for layer in self.layers)


class Broken(collections.abc.Mapping[str, Tensor]):
    """A mapping with keys that lead nowhere."""

    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts

    def __getitem__(self, key: str) -> Tensor:
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter("ab")

    def __len__(self) -> int:
        return 2


class Extended(dict[str, Any]):
    """A mapping with a tensor beside its items."""

    beside: Tensor


def extended(a: Tensor, b: Tensor) -> Extended:
    found = Extended(a=a)
    found.beside = b
    return found


CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "deque": lambda a, b: collections.deque([a, b]),
    "values": lambda a, b: {"a": a, "b": b}.values(),
    "items": lambda a, b: {"a": a, "b": b}.items(),
    "zip": lambda a, b: zip([a], [b], strict=True),
    "map": lambda a, b: map(torch.neg, [a, b]),
    "generator": lambda a, b: (t * 1 for t in (a, b)),
    "enumerate": lambda a, b: enumerate([a, b]),
    "reversed": lambda a, b: reversed([a, b]),
    "slots": Slots,
    "namedtuple": Pair,
    "namespace": lambda a, b: types.SimpleNamespace(a=a, inner=types.SimpleNamespace(b=b)),
    "own": Own,
    "cache": Cache,
    "broken": Broken,
    "lazy": lambda a, b: Lazy(lambda: a, lambda: b),
    "partial": lambda a, b: functools.partial(torch.add, a, other=b),
    "closure": lambda a, b: lambda: a.sum() + b.sum(),
    "chainmap": lambda a, b: collections.ChainMap({"a": a}, {"b": b}),
    "mapping proxy": lambda a, b: types.MappingProxyType({"a": a, "b": b}),
    "beside a mapping": extended,
    "distribution": lambda a, b: (a, torch.distributions.Normal(b, 1.0)),
    "packed": lambda a, b: (a, torch.nn.utils.rnn.pack_sequence([b])),
    "array": lambda a, b: (a, b.detach().numpy()),
}


class Returns(nn.Module):
    """Returns its last outputs and its hidden activations in a container."""

    def __init__(self, container: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.hidden, self.last = nn.Linear(6, 24), nn.Linear(24, 16), nn.Linear(16, 9)
        self.container = container

    def forward(self, x: Tensor) -> Any:
        hidden = self.hidden(self.first(x).relu())
        return self.container(self.last(hidden), hidden)


@pytest.mark.parametrize("name", CONTAINERS)
def test_hidden_channels_in_any_container_are_outputs(name: str) -> None:
    torch.manual_seed(0)
    plan = nac.plan(Returns(CONTAINERS[name]), X, width=0.5)
    assert plan.widths == {"first": 12}
    assert any(alone.layer == "hidden" for alone in plan.left_alone)


def test_leaves_are_found_once_and_without_end() -> None:
    one, loop = torch.ones(2), []
    loop += [loop, one]
    assert list(leaves_in(loop)) == [one]
    assert len(list(tensors_in(one for _ in iter(int, 1)))) == 10_000  # an iterator without an end is cut off
    kept = iter([one])
    assert list(leaves_in([kept], use_up=False)) == []
    assert next(kept) is one


class Argmax(nn.Module):
    """Returns class numbers only."""

    def __init__(self, *, dropped: bool) -> None:
        super().__init__()
        self.first, self.last, self.dropped = nn.Linear(6, 24), nn.Linear(24, 3), dropped

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        scores = self.last(x * (1 + x.shape[1] // 24) if self.dropped else x)
        return scores.argmax(-1)


def test_where_no_output_is_a_floating_number_layers_are_compared() -> None:
    torch.manual_seed(0)
    assert nac.plan(Argmax(dropped=False), X, width=0.5).widths == {"first": 12}
    with pytest.raises(ValueError, match="merging identical neurons changed the outputs"):
        nac.plan(Argmax(dropped=True), X, width=0.5)


class Silent(nn.Module):
    """Returns nothing that was computed from its neurons, and reads them outside of any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 24), nn.Parameter(torch.randn(3, 24))

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x).relu() @ self.last.T).argmax(-1)


def test_a_trial_that_compared_nothing_does_not_pass() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="no output is a floating number that could be compared"):
        nac.plan(Silent(), X, width=0.5)
