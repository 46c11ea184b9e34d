"""The plan of a compression: how wide every group will be, and what is left alone and why. Nothing changes yet."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from nac_gpu.cost import Cost, cost
from nac_gpu.graph import ExampleInputs, record
from nac_gpu.groups import Graph, Group, LeftAlone
from nac_gpu.rebuild import rebuild, tensors
from nac_gpu.sizes import attributes, guesses
from nac_gpu.trial import failure, in_float64, shrunk

Width = float | Mapping[str, int | float]


@dataclass(frozen=True)
class GroupPlan:
    """One group: its name, the layers that make its neurons, and how many there are before and after."""

    name: str
    layers: tuple[str, ...]
    before: int
    after: int


@dataclass(frozen=True)
class Plan:
    """What a compression will do; `print(plan)` shows it as a table.

    Attributes:
        groups: every group that can be compressed, in the order of the forward pass.
        left_alone: neurons that cannot, with the reason.
        before: cost of the model.
        after: cost of the compressed model.
    """

    groups: tuple[GroupPlan, ...]
    left_alone: tuple[LeftAlone, ...]
    before: Cost
    after: Cost

    @property
    def widths(self) -> dict[str, int]:
        """Neurons kept, by group. To change some: `nac.plan(model, inputs, width={**plan.widths, "conv1": 12})`."""
        return {group.name: group.after for group in self.groups}

    def to_json(self) -> str:
        """The plan as JSON."""
        return json.dumps(asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> "Plan":
        """A plan from its JSON.

        Raises:
            ValueError: the text is not a plan's JSON.
        """
        try:
            value: dict[str, Any] = json.loads(text)
            groups = tuple(GroupPlan(**{**group, "layers": tuple(group["layers"])}) for group in value["groups"])
            alone = tuple(LeftAlone(**item) for item in value["left_alone"])
            return Plan(groups, alone, Cost(**value["before"]), Cost(**value["after"]))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"not the JSON of a plan, expected what Plan.to_json() wrote: {error}") from error

    def __str__(self) -> str:
        """A table of the groups, what is left alone, and the cost before and after."""
        name = max([len("group"), *(len(group.name) for group in self.groups)])
        lines = [f"{'group':{name}}  {'neurons':>7}  {'kept':>6}  layers"]
        for group in self.groups:
            layers = ", ".join(group.layers)
            lines.append(f"{group.name:{name}}  {group.before:7,}  {group.after:6,}  {layers}")
        lines += [f"left alone: {alone.layer} ({alone.size:,}): {alone.reason}" for alone in self.left_alone]
        for title, old, new in (
            ("parameters", self.before.parameters, self.after.parameters),
            ("FLOPs", self.before.flops, self.after.flops),
        ):
            lines.append(f"{title}: {old:,} -> {new:,} ({100 * new / max(old, 1):.1f} %)")
        return "\n".join(lines)


def plan(model: nn.Module, example_inputs: ExampleInputs, *, width: Width) -> Plan:
    """Work out what a compression would do, and try it on the example inputs. The model is not changed.

    Args:
        model: any module whose forward pass runs on the example inputs.
        example_inputs: what the model is called with: a tensor, a sequence of arguments, or a mapping of keyword
            arguments. Values hardly matter, shapes do; no data is learnt from them.
        width: how many neurons to keep. One number is the share of every group's neurons that is kept, in (0, 1]. A
            mapping goes from a layer's name (or a pattern such as `"features.*"`) to a number of neurons (int) or a
            share (float); the layers it does not name keep their width.

    Raises:
        ValueError: weights that are not finite, a width outside of what is possible, an unknown layer, a model with
            nothing to compress.
        TypeError: integer or complex weights.
        RuntimeError: the forward pass fails on the example inputs.
    """
    return prepare(model, example_inputs, width)[0]


def prepare(model: nn.Module, example_inputs: ExampleInputs, width: Width) -> tuple[Plan, tuple[Group, ...]]:
    """The plan, and the groups in its order."""
    check_weights(model)
    graph = record(model, example_inputs)
    if not graph.groups:
        raise ValueError(f"nothing to compress: {_reasons(graph)}")
    widths = resolve(graph, width)
    graph, widths = _tried(model, example_inputs, graph, widths)
    if not graph.groups:
        raise ValueError(f"nothing to compress: {_reasons(graph)}")
    groups = tuple(
        GroupPlan(group.name, group.layers, group.size, after)
        for group, after in zip(graph.groups, widths, strict=True)
    )
    small = rebuild(model, shrunk(tensors(model), graph.groups, widths), attributes(model, graph.groups, widths))
    made = Plan(groups, graph.left_alone, cost(model, example_inputs), cost(small, example_inputs))
    return made, graph.groups


def check_weights(model: nn.Module) -> None:
    """Every parameter must be floating and finite: Ward's distances mean nothing otherwise.

    Raises:
        TypeError: integer or complex parameters, naming the first.
        ValueError: NaN or infinity, naming the first.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise TypeError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}, expected a floating type; "
                "compress the model before it is quantised, or convert it"
            )
        if not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            raise ValueError(
                f"{name} has {bad} values that are NaN or infinite, expected finite weights; "
                "the training that made them has diverged, take an earlier checkpoint"
            )


def resolve(graph: Graph, width: Width) -> list[int]:
    """The number of neurons to keep in each group.

    Raises:
        ValueError: an unknown layer, two widths for one group, or a width outside of what is possible.
    """
    if not isinstance(width, Mapping):
        return [_neurons(group.name, group.size, float(width)) for group in graph.groups]
    chosen: dict[str, tuple[str, int]] = {}
    for pattern, value in width.items():
        exact = [group for group in graph.groups if group.name == pattern]
        matches = exact or [group for group in graph.groups if _matches(group, pattern)]
        if not matches:
            raise ValueError(_unknown(graph, pattern))
        for group in matches:
            kept = _neurons(pattern, group.size, value)
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


def _neurons(name: str, size: int, value: int | float) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: width is {value!r}, expected a number of neurons (int) or a share (float)")
    if isinstance(value, int):
        if not 1 <= value <= size:
            raise ValueError(f"{name}: cannot keep {value} of {size} neurons, expected 1 to {size}")
        return value
    if not 0 < value <= 1:
        raise ValueError(f"{name}: cannot keep the share {value}, expected more than 0 and at most 1")
    return max(1, round(value * size))


def _reasons(graph: Graph) -> str:
    if not graph.left_alone:
        return "no Linear or convolution makes channels that another one reads; expected at least two such layers"
    return "; ".join(f"{alone.layer} ({alone.size}): {alone.reason}" for alone in graph.left_alone)


def _tried(
    model: nn.Module, example_inputs: ExampleInputs, graph: Graph, widths: Sequence[int]
) -> tuple[Graph, list[int]]:
    """The graph without the groups that fail the trial: all at once first, in halves where that fails.

    A group whose attributes are not known to the library is tried with several guesses. Units that cannot be merged make
    room for the channels that they were preferred to.
    """
    trial = _Trial(*in_float64(model, example_inputs), list(graph.left_alone))
    likely = [replace(group, attributes=next(guesses(model, group))) for group in graph.groups]
    good = trial.good(list(zip(likely, widths, strict=True)))
    if good and failure(trial.model, trial.inputs, [g for g, _ in good], [w for _, w in good]) is not None:
        together = failure(trial.model, trial.inputs, [g for g, _ in good], [w for _, w in good])
        trial.alone += [LeftAlone(g.name, g.size, f"together with the other groups: {together}") for g, _ in good]
        good = []
    return Graph(tuple(g for g, _ in good), tuple(trial.alone)), [w for _, w in good]


@dataclass
class _Trial:
    """Tries groups; those that fail are added to what is left alone."""

    model: nn.Module
    inputs: ExampleInputs
    alone: list[LeftAlone]

    def good(self, tried: list[tuple[Group, int]]) -> list[tuple[Group, int]]:
        """Those that pass."""
        if not tried:
            return []
        why = failure(self.model, self.inputs, [g for g, _ in tried], [w for _, w in tried])
        if why is None:
            return tried
        if len(tried) > 1:
            half = len(tried) // 2
            return self.good(tried[:half]) + self.good(tried[half:])
        group, width = tried[0]
        for attributes_too in list(guesses(self.model, group))[1:]:
            again = replace(group, attributes=attributes_too)
            if failure(self.model, self.inputs, [again], [width]) is None:
                return [(again, width)]
        if group.otherwise:
            share = width / group.size
            found = self.good([(other, max(1, round(share * other.size))) for other in group.otherwise])
            if found:
                return found
        self.alone.append(LeftAlone(group.name, group.size, why))
        return []
