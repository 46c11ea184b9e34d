"""`plan` and `compress`, from the user's model to a smaller one.

The steps of a compression: `take` the network; make a plan with `plan_for`, or prepare an existing one with `replay`;
compute the `assignments` of neurons to clusters and merge them, group by group (`merged`); train the result
(`refined`). Where a step fails that the result can do without, the next best is done, and the plan says so: see
`nac_gpu.distributed.fallbacks`.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from nac_gpu.calibration.batches import Calibration
from nac_gpu.calibration.evidence import Evidence
from nac_gpu.calibration.neurons import neuron_vectors
from nac_gpu.clustering.methods import METHODS, AssignmentMethod, l1, ward
from nac_gpu.distributed.consistency import check_arguments, without_values
from nac_gpu.distributed.ranks import ALONE, Ranks, joined
from nac_gpu.distributed.replicas import same_result
from nac_gpu.files.origin import remember
from nac_gpu.merging.attributes import attributes
from nac_gpu.merging.centroids import Deviation, Merger
from nac_gpu.merging.compensation import Compensator
from nac_gpu.merging.refinement import PASSES, learn
from nac_gpu.network.ambient import undisturbed
from nac_gpu.network.copying import in_float32, rebuild
from nac_gpu.network.running import ExampleInputs, set_mode_again
from nac_gpu.network.state import tensors
from nac_gpu.planning.plans import Plan
from nac_gpu.planning.prepare import Prepared, forget, keep, plan_for, replay
from nac_gpu.planning.request import LimitsByLayer, Names, Request, Share, Width, checked_passes
from nac_gpu.planning.taking import take
from nac_gpu.tracing.graph import Choice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: How merged neurons and the weights of their consumers are computed: see `compress`.
Rule = Literal["compensated", "restored", "centroid"]
#: How neurons are compared: see `compress`.
Neurons = Literal["activations", "folded", "weights"]


@undisturbed()
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
    """Plan a compression, and test the plan on the example inputs. The model is not changed.

    Give either widths or a budget for the whole model; for a budget, widths are chosen for the least loss (see
    `nac_gpu.planning.allocation`). The latest plan keeps the record of the model and the evidence about its neurons,
    which `compress` reuses and then frees; a new plan frees them, too.

    Args:
        model: any module whose forward pass runs on the example inputs.
        example_inputs: what the model is called with: a tensor, a sequence of arguments, or a mapping of keyword
            arguments. Their shapes matter, their values hardly do: nothing is fitted to them.
        width: how many neurons to keep. `nac_gpu.planning.request.Request` describes this and the following arguments
            in detail.
        params: budget for the parameters of the whole model, a share (float) or a number (int).
        flops: the same for the FLOPs of a forward pass on the example inputs.
        latency: the same for the time of that pass, a share (float).
        calibration: inputs for choosing widths: batches of unlabelled inputs, `"dream"` or `"none"`.
        limits: for a budget, the fewest and most neurons of layers.
        multiple_of: for a budget, widths are multiples of this, and narrower layers keep their neurons.
        only: names of layers or of modules that contain layers, or patterns; nothing else is compressed.
        skip: the same for layers that are not compressed.
        seed: of synthetic inputs; the global random state is not touched.
        process_group: processes that divide the work and get the same plan; all of them have to call this with the
            same model. Each may hold its own part of the calibration data. By default nothing is communicated.

    Raises:
        ValueError: weights are not finite, a width is out of range, a layer is unknown, nothing can be compressed, or a
            budget cannot be met (with the smallest possible); the model or the arguments differ from those of rank 0;
            parameters are sharded, but there is no process group.
        TypeError: integer or complex weights, calibration data of another type than the example inputs.
        RuntimeError: the forward pass fails on the example inputs or the calibration data; another rank failed or was
            lost.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> nac_gpu.plan(model, torch.zeros(1, 8), width=0.25).widths
    {'0': 8}
    """
    request = Request(width, params, flops, latency, limits, multiple_of, only, skip, calibration, seed)
    with joined(process_group, model) as ranks:
        request.check()
        check_arguments(ranks, {**request.arguments(), "example_inputs": without_values(example_inputs)})
        return keep(plan_for(take(model, example_inputs, ranks), request), request)


@undisturbed()
def compress(
    model: nn.Module,
    example_inputs: ExampleInputs,
    plan: Plan | None = None,
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
    method: str | AssignmentMethod = "ward",
    rule: Rule = "compensated",
    neurons: Neurons | None = None,
    refine: int = PASSES,
    seed: int = 0,
    process_group: "ProcessGroup | None" = None,
) -> nn.Module:
    """A smaller copy of a trained model, in which similar neurons of every layer are merged.

    Groups are merged in the order of the forward pass: the neurons are clustered, each cluster is replaced by its
    centroid, and the outgoing weights are summed (Algorithm 1 of Wang et al. 2020). The consumers are then refitted to
    reproduce their original outputs (see `nac_gpu.merging.compensation`). No training data is needed, but some
    unlabelled inputs improve the result. The copy is dense and has the same classes (except for
    `nn.MultiheadAttention`, see `nac_gpu.network.attention`); fine-tune it like any model. The original is not changed.

    Args:
        model: any module whose forward pass runs on the example inputs.
        example_inputs: what the model is called with: a tensor, a sequence of arguments, or a mapping of keyword
            arguments.
        plan: made by `nac_gpu.plan` for this model; else give `width`, `params`, `flops` or `latency`. With the same
            `calibration`, the evidence that the plan keeps is reused.
        width: how many neurons to keep; this and the next three as for `nac_gpu.plan`.
        params: budget for parameters.
        flops: budget for FLOPs.
        latency: budget for the time of a forward pass.
        calibration: inputs for comparing neurons and compensation: batches of unlabelled inputs, such as a list of
            tensors or a DataLoader (a few hundred inputs; labels are ignored); or `"dream"` for synthetic inputs (see
            `nac_gpu.calibration.dream` and `nac_gpu.calibration.tokens`). With `"none"`, or if no inputs can be made
            from the model, neurons are compared by their weights and the rule is `"restored"`. Where a step fails on
            this model, a warning and the plan that the result remembers say what was done in its place.
        limits: fewest and most neurons of layers; this and the next three as for `nac_gpu.plan`.
        multiple_of: chosen widths are multiples of this.
        only: names or patterns; nothing else is compressed.
        skip: names or patterns of layers that are not compressed.
        method: `"ward"` (agglomerative clustering), `"kmeans"`, `"random"`, `"l1"` (filter pruning by bare weights), or
            a function (see `nac_gpu.AssignmentMethod`); a label of -1 removes a neuron instead of merging it.
        rule: how merged neurons and their consumers are computed: `"compensated"` (consumers are refitted);
            `"restored"` (no compensation; a merged channel with BatchNorm gets the mean standard deviation of its
            members); or `"centroid"` (the paper's rule; it gets the smaller standard deviation of their mean).
        neurons: how they are compared: by `"activations"` (the default with compensation), by weights with BatchNorm
            `"folded"` in (the default without), or by bare `"weights"`.
        refine: passes over the calibration inputs after compensation, in which the smaller network is trained to
            reproduce the original's outputs (see `nac_gpu.merging.refinement`). Takes about as long as everything
            else; 0 skips it.
        seed: of synthetic inputs and of random methods; the global random state is not touched.
        process_group: processes that divide the work and get the same model, which is checked; all of them have to
            call this with the same model. Each may hold its own part of the calibration data: the result equals that
            of one process with all parts, in the order of ranks. By default nothing is communicated.

    Returns:
        A new module with smaller tensors, and the original's device, dtype, mode, `requires_grad` and hooks.

    Raises:
        ValueError: as `nac_gpu.plan`; also an unknown method or rule, a plan together with arguments that define one,
            or a plan that was made for another model.
        TypeError: as `nac_gpu.plan`.
        RuntimeError: the forward pass fails on the example inputs or the calibration data; another rank failed, was
            lost, or got another model.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> nac_gpu.compress(model, torch.zeros(1, 8), width=0.25)[0]
    Linear(in_features=8, out_features=8, bias=True)
    """
    request = Request(width, params, flops, latency, limits, multiple_of, only, skip, calibration, seed)
    with joined(process_group, model) as ranks:
        request.check() if plan is None else request.check_beside_plan()
        settings = MergeSettings.of(method, rule, neurons, refine, request.seed)
        planned = request.arguments() if plan is None else {"plan": plan.widths}
        check_arguments(ranks, {**settings.arguments(), **planned, "example_inputs": without_values(example_inputs)})
        network = take(model, example_inputs, ranks)
        prepared = (
            plan_for(network, request, settings.deviation)
            if plan is None
            else replay(network, plan, request, settings.deviation)
        )
        evidence = prepared.known(request) if settings.looks_at_activations else prepared.evidence
        small = made(prepared, evidence, settings)
        if plan is not None:
            forget(plan)
        return same_result(small, ranks)


@dataclass(frozen=True)
class MergeSettings:
    """How neurons are merged: the arguments of `compress` that a plan does not contain.

    Attributes:
        assign: assigns neurons to clusters.
        rule: how merged neurons and their consumers are computed.
        neurons: how neurons are compared; None to decide by the evidence.
        refine: passes of refinement over the calibration inputs.
        seed: of random methods and of refinement.
    """

    assign: AssignmentMethod
    rule: Rule
    neurons: Neurons | None
    refine: int
    seed: int

    @staticmethod
    def of(
        method: str | AssignmentMethod, rule: Rule, neurons: Neurons | None, refine: int, seed: int
    ) -> "MergeSettings":
        """From the arguments of `compress`.

        Raises:
            ValueError: an unknown name, or a negative number of passes.
        """
        if isinstance(method, str) and method not in METHODS:
            raise ValueError(f"unknown method {method!r}, expected one of {', '.join(METHODS)}, or a function")
        for name, value, known in (("rule", rule, get_args(Rule)), ("neurons", neurons, (None, *get_args(Neurons)))):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(k for k in known if k)}")
        assign = METHODS[method] if isinstance(method, str) else method
        if assign is l1 and neurons is None:
            neurons = "weights"
        return MergeSettings(assign, rule, neurons, checked_passes(refine), seed)

    @property
    def looks_at_activations(self) -> bool:
        """Whether activations have to be observed."""
        return self.rule == "compensated" or self.neurons == "activations"

    @property
    def deviation(self) -> Deviation:
        """How the standard deviation of a merged channel with BatchNorm is chosen."""
        return "centroid" if self.rule == "centroid" else "restored"

    def arguments(self) -> dict[str, object]:
        """The arguments that must be equal on all ranks."""
        method = getattr(self.assign, "__qualname__", type(self.assign).__qualname__)
        return {"method": method, **{name: value for name, value in vars(self).items() if name != "assign"}}


def made(prepared: Prepared, evidence: Evidence | None, settings: MergeSettings) -> nn.Module:
    """The smaller model of a plan, which remembers the plan with a line about each step that failed.

    If activations were observed in a copy of the model in float32, the smaller network is made of that copy first.
    """
    model = prepared.model
    wide = evidence is not None and evidence.float32 and _compensates(evidence, settings)
    network = in_float32(model) if wide else model
    small, failures = merged(prepared, network, evidence, settings)
    lines = [line for line in failures if line not in prepared.plan.changes]
    if lines:
        warnings.warn("; ".join(lines), stacklevel=3)
    not_refined = refined(small, network, prepared, evidence, settings)
    if network is not model:
        dtypes = {name: tensor.dtype for name, tensor in tensors(model).items()}
        state = {name: tensor.to(dtypes[name]) for name, tensor in tensors(small).items()}
        small = _rebuilt(model, state, prepared)
    lines += [not_refined] if not_refined else []
    plan = replace(prepared.plan, changes=(*prepared.plan.changes, *lines))
    set_mode_again(small)
    remember(small, model, plan, settings.seed)
    return small


def _rebuilt(network: nn.Module, state: Mapping[str, Tensor], prepared: Prepared) -> nn.Module:
    return rebuild(network, state, attributes(prepared.model, prepared.choices))


def merged(
    prepared: Prepared, network: nn.Module, evidence: Evidence | None, settings: MergeSettings
) -> tuple[nn.Module, tuple[str, ...]]:
    """The smaller network of a plan, with compensated consumers if the rule asks for them.

    Args:
        prepared: the plan.
        network: the model, or its copy in float32.
        evidence: about its neurons.
        settings: how they are merged.

    Returns:
        The network, and lines about what failed so far.
    """
    merger = _merger(prepared, network, evidence, settings)
    for choice, labels in assignments(prepared, evidence, settings, merger):
        merger.merge(choice.group, labels)
    failures = () if evidence is None else evidence.failures
    failures += tuple(merger.failures) if isinstance(merger, Compensator) else ()
    return _rebuilt(network, merger.finish(), prepared), failures


def _compensates(evidence: Evidence | None, settings: MergeSettings) -> bool:
    return settings.rule == "compensated" and evidence is not None and bool(evidence.batches)


def _merger(
    prepared: Prepared, network: nn.Module, evidence: Evidence | None, settings: MergeSettings
) -> Merger | Compensator:
    """The merger, with compensation if the rule asks for it and there are inputs."""
    subject = prepared.subject
    if not _compensates(evidence, settings):
        return Merger(tensors(network), settings.deviation)
    assert evidence is not None, "_compensates() checks this"
    # The sums of a batch are large matrices: a GPU computes them faster than ranks can exchange them.
    ranks = ALONE if subject.on_cuda else subject.ranks
    dtypes = {name: tensor.dtype for name, tensor in tensors(prepared.model).items()}
    return Compensator(network, subject.graph, evidence.batches, evidence.activities, ranks, dtypes=dtypes)


def assignments(
    prepared: Prepared, evidence: Evidence | None, settings: MergeSettings, merger: Merger | Compensator
) -> Iterator[tuple[Choice, Tensor]]:
    """The clusters of each group's neurons, int64 [n], in the order of the plan; merge each before taking the next.

    Clusters by activations belong to the original network, so the ranks divide the groups. Clusters by weights depend
    on the groups merged before, so every rank computes all of them.
    """
    comparable = _compensates(evidence, settings) and evidence is not None and evidence.comparable
    acting: list[Choice] = []
    if evidence is not None and (settings.neurons == "activations" or (settings.neurons is None and comparable)):
        acting = [c for c in prepared.choices if c.merges and c.group.name in evidence.activities]
    clusters = _by_activations(acting, evidence, settings, prepared.subject.ranks) if evidence is not None else iter(())
    names = {choice.group.name for choice in acting}
    for choice in prepared.choices:
        if not choice.merges:
            yield choice, torch.arange(choice.width)
        elif choice.group.name in names:
            yield choice, next(clusters)
        else:
            points = neuron_vectors(merger.state, choice.group, fold=settings.neurons != "weights")
            yield choice, settings.assign(points, choice.width, seed=settings.seed)


def _by_activations(
    choices: list[Choice], evidence: Evidence, settings: MergeSettings, ranks: Ranks
) -> Iterator[Tensor]:
    """Clusters of neurons by their activations."""

    def assigned(choice: Choice) -> Tensor:
        if settings.assign is ward:
            return evidence.tree(choice.group).cut(choice.width)
        points, masses = evidence.points(choice.group)
        return settings.assign(points, choice.width, weights=masses, seed=settings.seed)

    if settings.assign is ward:
        evidence.cluster(choice.group for choice in ranks.own(choices))
    return iter(ranks.share(choices, assigned))


def refined(
    small: nn.Module, network: nn.Module, prepared: Prepared, evidence: Evidence | None, settings: MergeSettings
) -> str:
    """Refine the smaller network, if it was compensated.

    Returns:
        A line that says why it was not refined; empty if it was, or was not to be.
    """
    if not _compensates(evidence, settings) or evidence is None:
        return ""
    touched = {m.tensor for choice in prepared.choices if choice.merges for m in choice.group.members}
    return learn(
        small,
        network,
        touched,
        evidence.batches,
        settings.refine,
        synthetic=evidence.synthetic,
        seed=settings.seed,
        ranks=prepared.subject.ranks,
    )
