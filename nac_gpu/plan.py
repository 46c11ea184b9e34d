"""The plan of a compression: how wide every group will be, and what is left alone and why. Nothing changes yet."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from nac_gpu.cost import Cost
from nac_gpu.forward import ExampleInputs
from nac_gpu.graph import record
from nac_gpu.groups import Graph, Group, LeftAlone
from nac_gpu.trial import Trial
from nac_gpu.unwrap import computed, unwrapped

Width = float | Mapping[str, int | float]
Names = Sequence[str] | None


@dataclass(frozen=True)
class GroupPlan:
    """One group.

    Attributes:
        name: of the layer that makes its neurons first.
        layers: all that make them.
        before: how many there are.
        after: how many are kept.
        units: they are heads of attention, or groups of channels, not channels.
        parameters_before: how many parameters belong to them, in all layers that make, scale or read them; a weight
            between two groups belongs to both.
        parameters_after: the same of the compressed model.
    """

    name: str
    layers: tuple[str, ...]
    before: int
    after: int
    units: bool = False
    parameters_before: int = 0
    parameters_after: int = 0


@dataclass(frozen=True)
class Plan:
    """What a compression will do; `print(plan)` shows it as a table.

    Attributes:
        groups: every group that can be compressed, in the order of the forward pass.
        left_alone: neurons that cannot, with the reason.
        before: cost of the model.
        after: cost of the compressed model.
        changes: what else will be different: wrappers and parametrisations that are taken off.
    """

    groups: tuple[GroupPlan, ...]
    left_alone: tuple[LeftAlone, ...]
    before: Cost
    after: Cost
    changes: tuple[str, ...] = ()

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
            return Plan(groups, alone, Cost(**value["before"]), Cost(**value["after"]), tuple(value["changes"]))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"not the JSON of a plan, expected what Plan.to_json() wrote: {error}") from error

    def __str__(self) -> str:
        """A table of the groups, what is left alone, and the cost before and after."""
        name = max([len("group"), *(len(group.name) for group in self.groups)])
        count = max(len(f"{group.parameters_before:,}") for group in self.groups) if self.groups else 0
        count = max(count, len("parameters"))
        title = f"{'group':{name}}  {'neurons':>7}  {'kept':>6}  {'parameters':>{count}}  {'after':>{count}}  layers"
        lines = [title]
        for group in self.groups:
            layers = ("heads or groups of " if group.units else "") + ", ".join(group.layers)
            cells = f"{group.parameters_before:{count},}  {group.parameters_after:{count},}"
            lines.append(f"{group.name:{name}}  {group.before:7,}  {group.after:6,}  {cells}  {layers}")
        lines += self.changes
        lines += [f"left alone: {alone.layer} ({alone.size:,}): {alone.reason}" for alone in self.left_alone]
        remedies = dict.fromkeys(alone.remedy for alone in self.left_alone if alone.remedy)
        lines += [f"to compress more: {remedy}" for remedy in remedies]
        for title, old, new in (
            ("parameters", self.before.parameters, self.after.parameters),
            ("FLOPs", self.before.flops, self.after.flops),
        ):
            lines.append(f"{title}: {old:,} -> {new:,} ({100 * new / max(old, 1):.1f} %)")
        return "\n".join(lines)


def plan(
    model: nn.Module, example_inputs: ExampleInputs, *, width: Width, only: Names = None, skip: Names = ()
) -> Plan:
    """Work out what a compression would do, and try it on the example inputs. The model is not changed.

    Args:
        model: any module whose forward pass runs on the example inputs.
        example_inputs: what the model is called with: a tensor, a sequence of arguments, or a mapping of keyword
            arguments. Values hardly matter, shapes do; no data is learnt from them.
        width: how many neurons to keep. One number is the share of every group's neurons that is kept, in (0, 1]. A
            mapping goes from a layer's name (or a pattern such as `"features.*"`) to a number of neurons (int) or a
            share (float); the layers it does not name keep their width.
        only: names of layers, of modules that hold layers, or patterns: nothing else is compressed.
        skip: the same, of what is not compressed.

    Raises:
        ValueError: weights that are not finite, a width outside of what is possible, an unknown layer, a model with
            nothing to compress.
        TypeError: integer or complex weights.
        RuntimeError: the forward pass fails on the example inputs.
    """
    return prepare(model, example_inputs, width, only, skip).plan


@dataclass(frozen=True)
class Prepared:
    """A plan with what it takes to carry it out.

    Attributes:
        plan: the plan.
        model: the network itself (see `nac_gpu.unwrap`).
        groups: in the order of the plan.
    """

    plan: Plan
    model: nn.Module
    groups: tuple[Group, ...]


def prepare(
    model: nn.Module,
    example_inputs: ExampleInputs,
    width: Width | Plan,
    only: Names = None,
    skip: Names = (),
) -> Prepared:
    """Make a plan, or find the groups of one that was made for this model."""
    model, wrappers = unwrapped(model)
    model, changes = computed(model)
    check_weights(model)
    graph = record(model, example_inputs)
    if isinstance(width, Plan):
        graph, widths = _again(graph, width)
    else:
        graph = _filtered(graph, only, skip)
        if not graph.groups:
            raise ValueError(f"nothing to compress: {_reasons(graph)}")
        widths = resolve(graph, width)
    trial = Trial(model, example_inputs, auxiliary=graph.auxiliary)
    chosen = trial.passed(list(zip(graph.groups, widths, strict=True)))
    if isinstance(width, Plan) and trial.alone:
        alone = trial.alone[0]
        raise ValueError(f"the plan cannot be carried out: {alone.layer} ({alone.size}): {alone.reason}; make it again")
    graph = replace(graph, groups=tuple(g for g, _ in chosen), left_alone=(*graph.left_alone, *trial.alone))
    if not graph.groups:
        raise ValueError(f"nothing to compress: {_reasons(graph)}")
    parameters = dict(model.named_parameters())
    planned = tuple(
        GroupPlan(g.name, g.layers, g.size, kept, bool(g.units), *_parameters_of(g, kept, parameters, trial.shapes))
        for g, kept in chosen
    )
    assert trial.after is not None, "they were tried together"
    before = Cost(sum(parameter.numel() for parameter in model.parameters()), graph.flops)
    made = Plan(planned, graph.left_alone, before, trial.after, (*wrappers, *changes))
    return Prepared(made, model, graph.groups)


def _parameters_of(
    group: Group, kept: int, parameters: Mapping[str, nn.Parameter], shapes: Mapping[str, torch.Size]
) -> tuple[int, int]:
    """How many parameters belong to a group's neurons, before and after."""
    counts = []
    for share, sizes in ((1.0, {n: p.shape for n, p in parameters.items()}), (kept / group.size, shapes)):
        others: dict[str, float] = {}  # the share of each tensor that belongs to other neurons
        for member in group.members:
            if member.tensor in parameters:
                own = member.index.numel() * share / sizes[member.tensor][member.dim]
                others[member.tensor] = others.get(member.tensor, 1.0) * (1 - own)
        counts.append(round(sum(sizes[name].numel() * (1 - left) for name, left in others.items())))
    return counts[0], counts[1]


def _again(graph: Graph, plan: Plan) -> tuple[Graph, list[int]]:
    """The groups of a plan among those of a model."""
    known = {(g.name, g.size): g for group in graph.groups for g in (*group.otherwise, group)}
    missing = [planned for planned in plan.groups if (planned.name, planned.before) not in known]
    if missing:
        raise ValueError(
            f"the plan was made for another model: it has a group {missing[0].name} of {missing[0].before}, which this "
            "model lacks; make it again"
        )
    groups = tuple(known[planned.name, planned.before] for planned in plan.groups)
    widths = [_neurons(planned.name, planned.before, planned.after) for planned in plan.groups]
    return replace(graph, groups=groups, left_alone=plan.left_alone), widths


def _filtered(graph: Graph, only: Names, skip: Names) -> Graph:
    """The graph with the groups that `only` and `skip` leave."""
    for option, patterns in (("only", only or ()), ("skip", skip or ())):
        if isinstance(patterns, str):
            raise TypeError(f"{option}={patterns!r}: expected a sequence of names, such as [{patterns!r}]")
        for pattern in patterns:
            if not any(_holds(group, pattern) for group in graph.groups) and not any(
                _named(alone.layer, pattern) for alone in graph.left_alone
            ):
                known = ", ".join(group.name for group in graph.groups)
                raise ValueError(f"unknown layer {pattern!r} in {option}=, expected some of: {known}")
    kept, alone = [], list(graph.left_alone)
    for group in graph.groups:
        if only is not None and not any(_holds(group, pattern) for pattern in only):
            alone.append(LeftAlone(group.name, group.size, "it is not named in only="))
        elif any(_holds(group, pattern) for pattern in skip or ()):
            alone.append(LeftAlone(group.name, group.size, "it is named in skip="))
        else:
            kept.append(group)
    return replace(graph, groups=tuple(kept), left_alone=tuple(alone))


def _holds(group: Group, pattern: str) -> bool:
    return any(_named(name, pattern) for name in (group.name, *group.layers))


def _named(name: str, pattern: str) -> bool:
    """The name, a module that holds it, or a pattern for either."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:length]), pattern) for length in range(1, len(parts) + 1))


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
    remedies = dict.fromkeys(alone.remedy for alone in graph.left_alone if alone.remedy)
    reasons = [f"{alone.layer} ({alone.size}): {alone.reason}" for alone in graph.left_alone]
    return "; ".join([*reasons, *(f"to compress more: {remedy}" for remedy in remedies)])
