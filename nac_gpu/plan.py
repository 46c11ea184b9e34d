"""The plan of a compression: how wide every group will be, and what is left alone and why. Nothing changes yet."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nac_gpu.agreement import check_arguments, check_same, same_model, shapes_of
from nac_gpu.choosing import choose
from nac_gpu.cost import Cost
from nac_gpu.distributed import ALONE, Ranks, joined
from nac_gpu.evidence import Evidence
from nac_gpu.forward import ExampleInputs
from nac_gpu.graph import record
from nac_gpu.groups import Graph, Group, LeftAlone
from nac_gpu.selection import Names, filtered, nothing_to_compress, with_groups
from nac_gpu.sharded import unsharded
from nac_gpu.trial import Trial
from nac_gpu.unwrap import computed, unwrapped
from nac_gpu.widths import Calibration, LimitsByLayer, Share, Wanted, Width, neurons, resolve

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
        lines = [title] if self.groups else []
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
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    width: Width | None = None,
    params: Share | None = None,
    flops: Share | None = None,
    latency: float | None = None,
    calibration: Calibration = "dream",
    limits: LimitsByLayer | None = None,
    multiple_of: int | None = None,
    only: Names = None,
    skip: Names = (),
    seed: int = 0,
    process_group: "ProcessGroup | None" = None,
) -> Plan:
    """Work out what a compression would do, and try it on the example inputs. The model is not changed.

    Give widths, or what the whole model may cost: then widths are chosen so that least is lost (see `nac_gpu.budget`).

    Args:
        model: any module whose forward pass runs on the example inputs.
        example_inputs: what the model is called with: a tensor, a sequence of arguments, or a mapping of keyword
            arguments. Values hardly matter, shapes do; no data is learnt from them.
        width: how many neurons to keep. One number is the share of every group's neurons that is kept, in (0, 1]. A
            mapping goes from a layer's name (or a pattern such as `"features.*"`) to a number of neurons (int) or a
            share (float); the layers it does not name keep their width. Beside a budget, one number is the most that
            any group keeps, and the layers that a mapping names are fixed while the others are chosen.
        params: the parameters of the whole model after: a share of those before (float), or a number (int).
        flops: the same for the operations of a forward pass on the example inputs.
        latency: the same for the time of that pass, a share of the model's own (float). Networks of several sizes are
            timed in turn with the model, where it is: see `nac_gpu.latency`. Budgets may be given together.
        calibration: what a budget is judged by: batches of unlabelled inputs; `"dream"` for inputs made up
            where that can be done (see `nac_gpu.dream`), else the weights alone; `"none"` for the weights alone, which
            is quick.
        limits: for a budget, the fewest and most neurons of layers (names or patterns), numbers or shares.
        multiple_of: for a budget, widths are multiples of this; by default 8 on CUDA, where odd widths are
            slow, and for a latency.
        only: names of layers, of modules that hold layers, or patterns: nothing else is compressed.
        skip: the same, of what is not compressed.
        seed: of dreams; the global random state is not touched.
        process_group: processes that work together, all of which call this: they divide the work, and all get the same
            plan. Each holds the same model; calibration data may be each one's own part. Without it nothing is
            communicated.

    Raises:
        ValueError: weights that are not finite, a width outside of what is possible, an unknown layer, a model with
            nothing to compress, a budget that cannot be met (with the least that can be); another model or other
            arguments than on rank 0; parameters divided among ranks without a process group.
        TypeError: integer or complex weights, calibration data of another kind than the example inputs.
        RuntimeError: the forward pass fails on the example inputs or the calibration data; another rank failed, or was
            lost.
    """
    wanted = Wanted(width, params, flops, latency, limits, multiple_of, calibration, seed)
    with joined(process_group, model) as ranks:
        return prepare(model, example_inputs, wanted, only, skip, ranks).plan


@dataclass(frozen=True)
class Prepared:
    """A plan with what it takes to carry it out.

    Attributes:
        plan: the plan.
        model: the network itself (see `nac_gpu.unwrap`).
        graph: its record, with the groups in the order of the plan.
        evidence: what its neurons were judged by, if they had to be.
    """

    plan: Plan
    model: nn.Module
    graph: Graph
    evidence: Evidence | None = None

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups, in the order of the plan."""
        return self.graph.groups


def prepare(
    model: nn.Module,
    example_inputs: ExampleInputs,
    wanted: Wanted | Plan,
    only: Names = None,
    skip: Names = (),
    ranks: Ranks = ALONE,
) -> Prepared:
    """Make a plan, or find the groups of one that was made for this model."""
    if isinstance(wanted, Wanted):
        wanted.check()
    asked = wanted.arguments() if isinstance(wanted, Wanted) else {"plan": wanted.widths}
    check_arguments(ranks, {**asked, "only": only, "skip": skip, "example_inputs": shapes_of(example_inputs)})
    example_inputs = ranks.sent(example_inputs)
    network, wrappers = unwrapped(model)
    network, sharded = unsharded(network, ranks)
    network, buffers = same_model(network, model, ranks)
    model, changes = computed(network)
    changes = (*wrappers, *sharded, *buffers, *changes)
    check_weights(model)
    graph = record(model, example_inputs)
    trial = Trial(model, example_inputs, auxiliary=graph.auxiliary)
    before = Cost(sum(parameter.numel() for parameter in model.parameters()), graph.flops)
    evidence = None
    if isinstance(wanted, Plan):
        graph = with_groups(graph, [(planned.name, planned.before) for planned in wanted.groups])
        graph = replace(graph, left_alone=wanted.left_alone)
        widths = [neurons(planned.name, planned.before, planned.after) for planned in wanted.groups]
        chosen = trial.passed(list(zip(graph.groups, widths, strict=True)))
        if trial.alone:
            alone = trial.alone[0]
            why = f"{alone.layer} ({alone.size}): {alone.reason}; make it again"
            raise ValueError(f"the plan cannot be carried out: {why}")
    else:
        graph = filtered(graph, only, skip)
        if not graph.groups:
            raise nothing_to_compress(graph)
        if wanted.budget:
            chosen, evidence, found = choose(model, example_inputs, graph, wanted, trial, before, ranks)
            changes = (*changes, *found)
        else:
            assert wanted.width is not None, "checked"
            chosen = trial.passed(list(zip(graph.groups, resolve(graph, wanted.width), strict=True)))
    graph = replace(graph, groups=tuple(g for g, _ in chosen), left_alone=(*graph.left_alone, *trial.alone))
    if not graph.groups:
        raise nothing_to_compress(graph)
    parameters = dict(model.named_parameters())
    planned = tuple(
        GroupPlan(g.name, g.layers, g.size, kept, bool(g.units), *_parameters_of(g, kept, parameters, trial.shapes))
        for g, kept in chosen
    )
    assert trial.after is not None, "they were tried together"
    made = Plan(planned, graph.left_alone, before, trial.after, changes)
    check_same("plan", made.to_json(), ranks)
    return Prepared(made, model, graph, evidence)


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
        # One bad value makes the sum bad, in one pass over the memory; a good sum may still overflow.
        if not bool(torch.isfinite(parameter.sum())) and not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            raise ValueError(
                f"{name} has {bad} values that are NaN or infinite, expected finite weights; "
                "the training that made them has diverged, take an earlier checkpoint"
            )
