"""What the user asks for: widths by layer, shares of parameters or FLOPs, limits."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from nac_gpu.budget import Limits
from nac_gpu.groups import Graph, Group

Width = float | Mapping[str, int | float]
#: What may be spent: a share of the model's own (float), or a number (int).
Share = int | float
#: Fewest and most neurons of a layer, each a number (int) or a share (float).
LimitsByLayer = Mapping[str, tuple[int | float, int | float]]
Calibration = Iterable[Any] | Literal["dream", "none"]


@dataclass(frozen=True)
class Wanted:
    """What was asked for; see `nac_gpu.plan`.

    Attributes:
        width: neurons to keep, by layer or the same share of all.
        params: parameters of the whole model.
        flops: operations of a forward pass.
        latency: time of a forward pass.
        limits: between which widths layers may end.
        multiple_of: what a width that a budget chooses is a multiple of; None is 8 on CUDA and for a latency, 1
            elsewhere.
        calibration: where statistics of activations come from.
        seed: of dreams.
    """

    width: Width | None = None
    params: Share | None = None
    flops: Share | None = None
    latency: float | None = None
    limits: LimitsByLayer | None = None
    multiple_of: int | None = None
    calibration: Calibration = "dream"
    seed: int = 0

    @property
    def budget(self) -> bool:
        """Widths are to be chosen."""
        return self.params is not None or self.flops is not None or self.latency is not None

    def check(self) -> None:
        """Whether this makes sense by itself.

        Raises:
            ValueError: nothing is asked for, or what is asked for is out of range.
        """
        if self.width is None and not self.budget:
            raise ValueError("expected width=, params=, flops= or latency= (or a plan, to compress), got none of them")
        if not self.budget and (self.limits is not None or self.multiple_of is not None):
            raise ValueError("limits= and multiple_of= are for budgets, expected params=, flops= or latency= too")
        if self.multiple_of is not None and self.multiple_of < 1:
            raise ValueError(f"multiple_of={self.multiple_of}, expected at least 1")
        for name, value in (("params", self.params), ("flops", self.flops)):
            if value is None:
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (whole and value >= 1) and not (isinstance(value, float) and 0 < value <= 1):
                raise ValueError(
                    f"{name}={value!r}, expected the share to keep (a float, more than 0 and at most 1) "
                    "or a number (an int, at least 1)"
                )
        if self.latency is not None and not (isinstance(self.latency, float) and 0 < self.latency < 1):
            raise ValueError(
                f"latency={self.latency!r}, expected the share of the model's own time (a float, more than 0 and less "
                "than 1)"
            )

    def arguments(self) -> dict[str, object]:
        """What can be compared: all but the calibration data."""
        return {name: value for name, value in vars(self).items() if name != "calibration"}

    def most(self, parameters: int, flops: int) -> tuple[float, float]:
        """Parameters and operations that may be spent, of a model that has these."""
        return _most(self.params, parameters), _most(self.flops, flops)


def _most(share: Share | None, whole: int) -> float:
    if share is None:
        return float("inf")
    return float(share) if isinstance(share, int) else share * whole


def limits_of(graph: Graph, wanted: Wanted, step: int) -> list[Limits]:
    """Between which widths each group may end, for a budget.

    A layer that `width` names has that width; one number is the most that any group keeps. Without limits, a group
    keeps at least one neuron.

    Raises:
        ValueError: an unknown layer, or limits out of range.
    """
    exact = resolve(graph, wanted.width) if isinstance(wanted.width, Mapping) else None
    named = set() if exact is None else _named(graph, wanted.width)
    chosen: dict[str, tuple[int, int]] = {}
    for pattern, pair in (wanted.limits or {}).items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"{pattern}: limits are {pair!r}, expected a pair: fewest and most neurons")
        for group in _matching(graph, pattern):
            least, most = (neurons(pattern, group.size, value) for value in pair)
            if least > most:
                raise ValueError(f"{pattern}: limits are {least} to {most} neurons, expected the fewest first")
            chosen[group.name] = (least, most)
    result = []
    for number, group in enumerate(graph.groups):
        least, most = chosen.get(group.name, (1, group.size))
        own = 1 if group.units else step
        if group.name not in chosen and group.size > own:
            least = max(least, own)
        if exact is not None and group.name in named:
            least = most = exact[number]
        elif wanted.width is not None and not isinstance(wanted.width, Mapping):
            most = max(least, min(most, neurons(group.name, group.size, float(wanted.width))))
        result.append(Limits(least, most, own))
    return result


def _named(graph: Graph, width: Any) -> set[str]:
    return {group.name for pattern in width for group in _matching(graph, pattern)}


def _matching(graph: Graph, pattern: str) -> list[Group]:
    """The groups that a layer's name or a pattern stands for."""
    exact = [group for group in graph.groups if group.name == pattern]
    matches = exact or [group for group in graph.groups if _matches(group, pattern)]
    if not matches:
        raise ValueError(_unknown(graph, pattern))
    return matches


def resolve(graph: Graph, width: Width) -> list[int]:
    """The number of neurons to keep in each group.

    Raises:
        ValueError: an unknown layer, two widths for one group, or a width outside of what is possible.
    """
    if not isinstance(width, Mapping):
        return [neurons(group.name, group.size, float(width)) for group in graph.groups]
    chosen: dict[str, tuple[str, int]] = {}
    for pattern, value in width.items():
        for group in _matching(graph, pattern):
            kept = neurons(pattern, group.size, value)
            before = chosen.setdefault(group.name, (pattern, kept))
            if before[1] != kept:
                raise ValueError(
                    f"{before[0]} and {pattern} share their neurons (group {group.name}), expected one width, "
                    f"got {before[1]} and {kept}"
                )
    return [chosen[group.name][1] if group.name in chosen else group.size for group in graph.groups]


def _matches(group: Group, pattern: str) -> bool:
    return any(name == pattern or fnmatchcase(name, pattern) for name in (group.name, *group.layers))


def _unknown(graph: Graph, pattern: str) -> str:
    for alone in graph.left_alone:
        if alone.layer == pattern:
            return f"{pattern} cannot be compressed: {alone.reason}; take it out of the widths"
    known = ", ".join(group.name for group in graph.groups)
    return f"unknown layer {pattern!r} in the widths, expected one of: {known}"


def neurons(name: str, size: int, value: int | float, what: str = "neurons") -> int:
    """A width as a number of neurons.

    Args:
        name: of the layer, for errors.
        size: how many neurons it has.
        value: a number (int) or a share (float).
        what: it is a number of, for errors.

    Raises:
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: width is {value!r}, expected a number of {what} (int) or a share (float)")
    if isinstance(value, int):
        if not 1 <= value <= size:
            raise ValueError(f"{name}: cannot keep {value} of {size} {what}, expected 1 to {size}")
        return value
    if not 0 < value <= 1:
        raise ValueError(f"{name}: cannot keep the share {value}, expected more than 0 and at most 1")
    return max(1, round(value * size))
