"""From a network and a request to a tested plan, with everything that is needed to carry it out."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from nac_gpu.calibration.batches import Calibration
from nac_gpu.calibration.evidence import Evidence
from nac_gpu.calibration.gathering import gather
from nac_gpu.distributed.consistency import check_same
from nac_gpu.merging.centroids import Deviation
from nac_gpu.network.state import fingerprint, tensors
from nac_gpu.planning.bench import Measured
from nac_gpu.planning.budget import choose
from nac_gpu.planning.layers import filtered, kept_of, nothing_to_compress, widths_of, with_groups
from nac_gpu.planning.plans import GroupPlan, Plan
from nac_gpu.planning.request import Request
from nac_gpu.planning.subject import Network, Subject
from nac_gpu.planning.taking import recorded
from nac_gpu.planning.trial import Trial
from nac_gpu.tracing.graph import Choice, Graph, Group


@dataclass(frozen=True)
class Prepared:
    """A plan with everything that is needed to carry it out.

    Attributes:
        plan: the plan.
        subject: the network, with its record.
        choices: the groups with their widths, in the order of the plan.
        evidence: used to choose the widths; None if the user gave them.
    """

    plan: Plan
    subject: Subject
    choices: tuple[Choice, ...]
    evidence: Evidence | None = None

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.subject.model

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups, in the order of the plan."""
        return tuple(choice.group for choice in self.choices)

    def known(self, request: Request) -> Evidence:
        """The evidence of the plan, gathered now if there is none yet."""
        if self.evidence is not None:
            return self.evidence
        subject = self.subject
        request = _runnable(subject, request)
        return gather(subject.model, subject.inputs, self.groups, request.calibration, request.seed, subject.ranks)


def plan_for(network: Network, request: Request, deviation: Deviation = "restored") -> Prepared:
    """Make a plan.

    Args:
        network: the network.
        request: what is asked for.
        deviation: of the rule that will merge the groups, see `nac_gpu.merging.centroids.Merger`.

    Raises:
        ValueError: an unknown layer, a width out of range, nothing to compress, or a budget that cannot be met.
        RuntimeError: the forward pass fails, or the ranks made different plans.
    """
    subject = recorded(network)
    request = _runnable(subject, request)
    trial = _trial(subject, deviation)
    graph = filtered(subject.graph, request.only, request.skip)
    if not graph.groups:
        raise nothing_to_compress(graph)
    subject, evidence, lines = replace(subject, graph=graph), None, ()
    if request.budget:
        chosen = choose(subject, request, trial)
        outcome, evidence, refused, lines = chosen.outcome, chosen.evidence, chosen.refused, chosen.lines
    else:
        assert request.width is not None, "checked"
        widths = widths_of(graph, request.width)
        outcome = trial.run([Choice(group, width) for group, width in zip(graph.groups, widths, strict=True)])
        refused = outcome.refused
    graph = replace(
        graph, groups=tuple(choice.group for choice in outcome.choices), left_alone=(*graph.left_alone, *refused)
    )
    if outcome.measured is None:
        raise nothing_to_compress(graph)
    subject = replace(subject, graph=graph, changes=(*subject.changes, *lines, *_by_weights(subject)))
    return Prepared(_plan(subject, outcome.choices, outcome.measured), subject, outcome.choices, evidence)


def _trial(subject: Subject, deviation: Deviation) -> Trial:
    return Trial(
        subject.model, subject.inputs, larger=subject.larger, deviation=deviation, auxiliary=subject.graph.auxiliary
    )


def _runnable(subject: Subject, request: Request) -> Request:
    """The request, without inputs on which neurons would be observed if the model writes to its own parameters.

    What such a model computes depends on how often it ran, so its activations say nothing about its weights.
    """
    return replace(request, calibration="none") if subject.graph.written else request


def _by_weights(subject: Subject) -> tuple[str, ...]:
    names = subject.graph.written
    if not names:
        return ()
    told = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (f"neurons are compared by their weights, without compensation: forward writes to {told}",)


def replay(network: Network, plan: Plan, request: Request, deviation: Deviation = "restored") -> Prepared:
    """Prepare a plan that was made before for this model.

    The record and the evidence that the plan keeps are reused if the model and its inputs are unchanged.

    Args:
        network: the network.
        plan: the plan.
        request: its `calibration` and `seed` define the evidence.
        deviation: as for `plan_for`.

    Raises:
        ValueError: the plan was made for another model, or cannot be carried out on these inputs.
        RuntimeError: the forward pass fails, or the ranks made different plans.
    """
    memory = _memory_of(plan)
    fits = memory is not None and memory.fits(network, deviation)
    if all(network.ranks.gathered(fits)) and memory is not None:
        subject = Subject(**vars(network), graph=memory.graph, cost=plan.before)
        request = _runnable(subject, request)
        return Prepared(plan, subject, memory.choices, memory.evidence_for(network, request))
    subject = recorded(network)
    graph = with_groups(subject.graph, [(planned.name, planned.before) for planned in plan.groups])
    widths = [kept_of(planned.name, planned.before, planned.after) for planned in plan.groups]
    outcome = _trial(subject, deviation).run(
        [Choice(group, width) for group, width in zip(graph.groups, widths, strict=True)]
    )
    if outcome.refused:
        alone = outcome.refused[0]
        why = f"{alone.layer} ({alone.size}): {alone.reason}; make it again"
        raise ValueError(f"the plan cannot be carried out: {why}")
    graph = replace(graph, groups=tuple(choice.group for choice in outcome.choices), left_alone=plan.left_alone)
    if outcome.measured is None:
        raise nothing_to_compress(graph)
    subject = replace(subject, graph=graph)
    return Prepared(_plan(subject, outcome.choices, outcome.measured), subject, outcome.choices)


@dataclass(frozen=True)
class _Memory:
    """Results that a plan keeps for `replay`.

    Attributes:
        fingerprint: of the network and its inputs.
        graph: its record, with the groups of the plan.
        choices: the groups with their widths.
        evidence: used to choose the widths, without the tensors of the network.
        calibration: the `calibration` argument that the evidence is from.
        seed: of synthetic inputs.
        deviation: of the rule of the trial.
    """

    fingerprint: tuple[object, ...]
    graph: Graph
    choices: tuple[Choice, ...]
    evidence: Evidence | None
    calibration: Calibration
    seed: int
    deviation: Deviation = "restored"

    def fits(self, network: Network, deviation: Deviation) -> bool:
        """Whether the network is the same, and was tried with the same rule."""
        return self.deviation == deviation and self.fingerprint == fingerprint(network.model, network.inputs)

    def evidence_for(self, network: Network, request: Request) -> Evidence | None:
        """The evidence, if the request would gather the same; else None."""
        if self.evidence is None:
            return None
        words = isinstance(request.calibration, str) and isinstance(self.calibration, str)
        same = self.calibration == request.calibration if words else self.calibration is request.calibration
        fits = same and (self.seed == request.seed or not self.evidence.synthetic)
        return replace(self.evidence, state=tensors(network.model)) if all(network.ranks.gathered(fits)) else None


_KEPT_AS = "_memory"
_latest: "weakref.ref[Plan] | None" = None


def keep(prepared: Prepared, request: Request) -> Plan:
    """The plan, with the record and the evidence attached so that `replay` can reuse them.

    Only the latest plan has them: evidence takes memory.
    """
    global _latest
    previous = None if _latest is None else _latest()
    if previous is not None:
        forget(previous)
    plan, subject, evidence = prepared.plan, prepared.subject, prepared.evidence
    bits = fingerprint(subject.model, subject.inputs)
    if bits is not None:
        evidence = None if evidence is None else replace(evidence, state={})
        memory = _Memory(bits, subject.graph, prepared.choices, evidence, request.calibration, request.seed)
        object.__setattr__(plan, _KEPT_AS, memory)  # not a field, so it is neither compared nor saved
        _latest = weakref.ref(plan)
    return plan


def forget(plan: Plan) -> None:
    """Free the attached record and evidence, once the plan was carried out."""
    vars(plan).pop(_KEPT_AS, None)


def _memory_of(plan: Plan) -> _Memory | None:
    return vars(plan).get(_KEPT_AS)


def _plan(subject: Subject, choices: tuple[Choice, ...], measured: Measured) -> Plan:
    """The plan; raises if the ranks made different ones."""
    parameters = {name: parameter.shape for name, parameter in subject.model.named_parameters()}
    groups = tuple(
        GroupPlan(
            choice.group.name,
            choice.group.layers,
            choice.group.size,
            choice.width,
            bool(choice.group.units),
            *_parameters_of(choice, parameters, measured.shapes),
        )
        for choice in choices
    )
    plan = Plan(groups, subject.graph.left_alone, subject.cost, measured.cost, subject.changes)
    check_same("plan", plan.to_json(), subject.ranks)
    return plan


def _parameters_of(
    choice: Choice, parameters: Mapping[str, torch.Size], shapes: Mapping[str, torch.Size]
) -> tuple[int, int]:
    """The number of parameters that belong to a group's neurons, before and after."""
    counts = []
    for share, sizes in ((1.0, parameters), (choice.width / choice.group.size, shapes)):
        others: dict[str, float] = {}  # the share of each tensor that belongs to other neurons
        for member in choice.group.members:
            if member.tensor in parameters:
                own = member.index.numel() * share / sizes[member.tensor][member.dim]
                others[member.tensor] = others.get(member.tensor, 1.0) * (1 - own)
        counts.append(round(sum(sizes[name].numel() * (1 - left) for name, left in others.items())))
    return counts[0], counts[1]
