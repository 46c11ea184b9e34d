"""`plan` and `compress`, from the user's model to a smaller one.

The story of a compression: `take` the network, `plan_for` what was asked (or `replay` a plan that was made before),
then group by group find the `assignments` of neurons to clusters and `merge` them, and at last `refine` the result.
"""

from collections.abc import Iterator
from dataclasses import dataclass
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
from nac_gpu.merging.attributes import attributes, set_configs
from nac_gpu.merging.centroids import Merger
from nac_gpu.merging.compensation import Compensator
from nac_gpu.merging.refinement import PASSES, learn
from nac_gpu.network.copying import rebuild
from nac_gpu.network.running import ExampleInputs
from nac_gpu.network.state import tensors
from nac_gpu.planning.plans import Plan
from nac_gpu.planning.prepare import Prepared, forget, keep, plan_for, replay
from nac_gpu.planning.request import LimitsByLayer, Names, Request, Share, Width
from nac_gpu.planning.taking import take
from nac_gpu.tracing.graph import Choice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: How a merged neuron and what reads it are chosen: see `compress`.
Rule = Literal["compensated", "restored", "centroid"]
#: What neurons are compared by: see `compress`.
Neurons = Literal["activations", "folded", "weights"]


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

    Give widths, or what the whole model may cost: then widths are chosen so that least is lost (see
    `nac_gpu.planning.allocation`). The plan remembers what was found out about the model, so that `compress` carries
    it out without finding it out again; once it is carried out (or no longer used), that memory is freed.

    Args:
        model: any module whose forward pass runs on the example inputs.
        example_inputs: what the model is called with: a tensor, a sequence of arguments, or a mapping of keyword
            arguments. Values hardly matter, shapes do; no data is learnt from them.
        width: how many neurons to keep; this and all that follows as in `nac_gpu.planning.request.Request`.
        params: what share (float) or number (int) of the whole model's parameters to keep.
        flops: the same for the operations of a forward pass on the example inputs.
        latency: the same for the time of that pass, a share (float).
        calibration: by what a budget judges neurons: batches of unlabelled inputs, `"dream"` or `"none"`.
        limits: for a budget, the fewest and most neurons of layers.
        multiple_of: for a budget, widths are multiples of this.
        only: names of layers, of modules that hold layers, or patterns: nothing else is compressed.
        skip: the same, of what is not compressed.
        seed: of synthetic inputs; the global random state is not touched.
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

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> plan(model, torch.zeros(1, 8), width=0.25).widths
    {'0': 8}
    """
    request = Request(width, params, flops, latency, limits, multiple_of, only, skip, calibration, seed)
    with joined(process_group, model) as ranks:
        request.check()
        check_arguments(ranks, {**request.arguments(), "example_inputs": without_values(example_inputs)})
        return keep(plan_for(take(model, example_inputs, ranks), request), request)


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
    """A smaller copy of a trained model: similar neurons of every layer become one.

    Layer by layer, in the order of the forward pass: the neurons are clustered, each cluster becomes its centroid, the
    outgoing connections are summed (Algorithm 1 of Wang et al. 2020) and then changed to make up for what was lost
    (see `nac_gpu.merging.compensation`). No training data is needed; some unlabelled inputs make the result better. The
    copy is dense and of the same classes (but for `nn.MultiheadAttention`, see `nac_gpu.network.attention`); fine-tune
    it as any model. The original is not changed.

    Args:
        model: any module whose forward pass runs on the example inputs.
        example_inputs: what the model is called with: a tensor, a sequence of arguments, or a mapping of keyword
            arguments.
        plan: made by `nac_gpu.plan` for this model; else give `width`, `params`, `flops` or `latency`. With the same
            `calibration`, what the plan was judged by is used again.
        width: as for `nac_gpu.plan`, and so are the next three.
        params: a share or number of parameters to keep.
        flops: a share or number of operations to keep.
        latency: a share of the time to keep.
        calibration: on what activations are compared and compensated: batches of unlabelled inputs, such as a list of
            tensors or a DataLoader (a few hundred inputs; labels beside them are not used); `"dream"` for synthetic
            inputs (see `nac_gpu.calibration.dream` and `nac_gpu.calibration.tokens`); with `"none"`, or where the model
            cannot make any, neurons are compared by their weights and the rule is `"restored"`.
        limits: as for `nac_gpu.plan`, and so are the next three.
        multiple_of: of what chosen widths are multiples.
        only: what alone is compressed.
        skip: what is not compressed.
        method: `"ward"` (agglomerative clustering), `"kmeans"`, `"random"`, `"l1"` (filter pruning by bare weights), or
            a function of the same signature (see `nac_gpu.AssignmentMethod`); a label of -1 removes a neuron instead of
            merging it.
        rule: how a merged neuron and what reads it are chosen: `"compensated"`; `"restored"`, without compensation: a
            merged channel with BatchNorm deviates as the merged ones did in the mean; or `"centroid"`, the paper's
            rule: it deviates as their mean does.
        neurons: how they are compared: by their `"activations"` (the default where they are compensated), by their
            weights with BatchNorm `"folded"` in (else the default), or by their bare `"weights"`.
        refine: how often, after compensation, the smaller network sees each calibration input to learn to answer as the
            original does (see `nac_gpu.merging.refinement`): about as long as the rest takes. 0 leaves it out.
        seed: of synthetic inputs and of methods that draw numbers; the global random state is not touched.
        process_group: processes that work together, all of which call this: they divide the work, and all get the same
            model, which is checked. Each holds the same model; calibration data may be each one's own part: the result
            is that of one process with all parts, rank 0's first. Without it nothing is communicated.

    Returns:
        A new module: the original's device, dtype, mode, `requires_grad` and hooks, smaller tensors.

    Raises:
        ValueError: as `nac_gpu.plan`; also an unknown method or rule, a plan beside what makes one, or a plan that was
            made for another model.
        TypeError: as `nac_gpu.plan`.
        RuntimeError: the forward pass fails on the example inputs or the calibration data; another rank failed, or was
            lost, or made another model.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> compress(model, torch.zeros(1, 8), width=0.25)[0]
    Linear(in_features=8, out_features=8, bias=True)
    """
    request = Request(width, params, flops, latency, limits, multiple_of, only, skip, calibration, seed)
    with joined(process_group, model) as ranks:
        request.check() if plan is None else request.check_beside_plan()
        way = Way.of(method, rule, neurons, refine, seed)
        planned = request.arguments() if plan is None else {"plan": plan.widths}
        check_arguments(ranks, {**way.arguments(), **planned, "example_inputs": without_values(example_inputs)})
        network = take(model, example_inputs, ranks)
        prepared = plan_for(network, request) if plan is None else replay(network, plan, request)
        evidence = prepared.known(request) if way.looks_at_activations else prepared.evidence
        small = refined(merged(prepared, evidence, way), prepared, evidence, way)
        if plan is not None:
            forget(plan)
        return same_result(small, ranks)


@dataclass(frozen=True)
class Way:
    """How neurons are merged, as `compress` is told.

    Attributes:
        assign: which neurons become one.
        rule: what they become.
        neurons: what they are compared by; None for what suits the evidence.
        refine: how often the smaller network sees each calibration input afterwards.
        seed: of methods that draw numbers, and of refinement.
    """

    assign: AssignmentMethod
    rule: Rule
    neurons: Neurons | None
    refine: int
    seed: int

    @staticmethod
    def of(method: str | AssignmentMethod, rule: Rule, neurons: Neurons | None, refine: int, seed: int) -> "Way":
        """The way that a user names.

        Raises:
            ValueError: an unknown name, or a number of passes below 0.
        """
        if isinstance(method, str) and method not in METHODS:
            raise ValueError(f"unknown method {method!r}, expected one of {', '.join(METHODS)}, or a function")
        for name, value, known in (("rule", rule, get_args(Rule)), ("neurons", neurons, (None, *get_args(Neurons)))):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(k for k in known if k)}")
        if refine < 0:
            raise ValueError(f"refine={refine}, expected a number of passes over the calibration inputs, 0 for none")
        assign = METHODS[method] if isinstance(method, str) else method
        if assign is l1 and neurons is None:
            neurons = "weights"
        return Way(assign, rule, neurons, refine, seed)

    @property
    def looks_at_activations(self) -> bool:
        """Whether it has to be known how neurons act."""
        return self.rule == "compensated" or self.neurons == "activations"

    def arguments(self) -> dict[str, object]:
        """What can be compared between ranks."""
        method = getattr(self.assign, "__qualname__", type(self.assign).__qualname__)
        return {"method": method, **{name: value for name, value in vars(self).items() if name != "assign"}}


def merged(prepared: Prepared, evidence: Evidence | None, way: Way) -> nn.Module:
    """The smaller network of a plan, with what reads merged neurons compensated if the way asks for it."""
    merger = _merger(prepared, evidence, way)
    for choice, labels in assignments(prepared, evidence, way, merger):
        merger.merge(choice.group, labels)
    small = rebuild(prepared.model, merger.finish(), attributes(prepared.model, prepared.choices))
    set_configs(small, prepared.choices)
    remember(small, prepared.model, prepared.plan, way.seed)
    return small


def _compensates(evidence: Evidence | None, way: Way) -> bool:
    return way.rule == "compensated" and evidence is not None and bool(evidence.batches)


def _merger(prepared: Prepared, evidence: Evidence | None, way: Way) -> Merger | Compensator:
    """What merges groups, one after another."""
    model, subject = prepared.model, prepared.subject
    if not _compensates(evidence, way):
        return Merger(tensors(model), "centroid" if way.rule == "centroid" else "restored")
    assert evidence is not None, "there is none else to compensate by"
    # Sums over a batch have many columns squared: a GPU makes them in less time than it takes to send them.
    ranks = ALONE if subject.on_cuda else subject.ranks
    return Compensator(model, subject.graph, evidence.batches, evidence.activities, ranks)


def assignments(
    prepared: Prepared, evidence: Evidence | None, way: Way, merger: Merger | Compensator
) -> Iterator[tuple[Choice, Tensor]]:
    """The clusters of each group's neurons, int64 [n], in the order of the plan; merge each before asking for the next.

    Clusters by activations are those of the original network, so ranks divide the groups. Clusters by weights depend on
    the groups that were merged before: every rank works them out.
    """
    comparable = _compensates(evidence, way) and evidence is not None and evidence.comparable
    acting: list[Choice] = []
    if evidence is not None and (way.neurons == "activations" or (way.neurons is None and comparable)):
        acting = [c for c in prepared.choices if c.merges and c.group.name in evidence.activities]
    clusters = _by_activations(acting, evidence, way, prepared.subject.ranks) if evidence is not None else iter(())
    names = {choice.group.name for choice in acting}
    for choice in prepared.choices:
        if not choice.merges:
            yield choice, torch.arange(choice.width)
        elif choice.group.name in names:
            yield choice, next(clusters)
        else:
            points = neuron_vectors(merger.state, choice.group, fold=way.neurons != "weights")
            yield choice, way.assign(points, choice.width, seed=way.seed)


def _by_activations(choices: list[Choice], evidence: Evidence, way: Way, ranks: Ranks) -> Iterator[Tensor]:
    """Clusters of neurons by how they act."""

    def assigned(choice: Choice) -> Tensor:
        if way.assign is ward:
            return evidence.tree(choice.group).cut(choice.width)
        points, masses = evidence.points(choice.group)
        return way.assign(points, choice.width, weights=masses, seed=way.seed)

    if way.assign is ward:
        evidence.cluster(choice.group for choice in ranks.own(choices))
    return iter(ranks.share(choices, assigned))


def refined(small: nn.Module, prepared: Prepared, evidence: Evidence | None, way: Way) -> nn.Module:
    """The smaller network after it has learnt to answer as the original does, if it was compensated."""
    if _compensates(evidence, way) and evidence is not None:
        touched = {m.tensor for choice in prepared.choices if choice.merges for m in choice.group.members}
        learn(
            small,
            prepared.model,
            touched,
            evidence.batches,
            way.refine,
            synthetic=evidence.synthetic,
            seed=way.seed,
            ranks=prepared.subject.ranks,
        )
    return small
