"""`compress`: plan, cluster, merge, rebuild."""

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from nac_gpu.agreement import check_arguments, same_result
from nac_gpu.clustering import METHODS, AssignmentMethod, ward
from nac_gpu.compensation import Compensator
from nac_gpu.distributed import ALONE, Ranks, joined
from nac_gpu.evidence import Evidence, gather
from nac_gpu.forward import ExampleInputs
from nac_gpu.groups import Group
from nac_gpu.merge import Merger
from nac_gpu.neurons import neuron_vectors
from nac_gpu.origin import remember
from nac_gpu.plan import Plan, Prepared, prepare
from nac_gpu.rebuild import rebuild, tensors
from nac_gpu.refinement import PASSES, learn
from nac_gpu.selection import Names
from nac_gpu.sizes import attributes, set_configs
from nac_gpu.widths import Calibration, LimitsByLayer, Share, Wanted, Width

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Rule = Literal["compensated", "restored", "centroid"]
Neurons = Literal["activations", "folded", "weights"]


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
    (see `nac_gpu.compensation`). No training data is needed; some unlabelled inputs make the result better. The copy is
    dense and of the same classes (but for `nn.MultiheadAttention`, see `nac_gpu.attention`); fine-tune it as any model.
    The original is not changed.

    Args:
        model: any module whose forward pass runs on the example inputs.
        example_inputs: what the model is called with: a tensor, a sequence of arguments, or a mapping of keyword
            arguments.
        plan: made by `nac_gpu.plan` for this model; else give `width`, `params`, `flops` or `latency`.
        width: as for `nac_gpu.plan`.
        params: as for `nac_gpu.plan`.
        flops: as for `nac_gpu.plan`.
        latency: as for `nac_gpu.plan`.
        calibration: on what activations are compared and compensated: batches of unlabelled inputs, such as a list of
            tensors or a DataLoader (a few hundred inputs; labels beside them are not looked at); `"dream"` for inputs
            made up (see `nac_gpu.dream` and `nac_gpu.tokens`); with `"none"`, or where none can be made up, neurons
            are compared by their weights and the rule is `"restored"`.
        limits: as for `nac_gpu.plan`.
        multiple_of: as for `nac_gpu.plan`.
        only: as for `nac_gpu.plan`.
        skip: as for `nac_gpu.plan`.
        method: `"ward"` (agglomerative clustering), `"kmeans"`, `"random"`, or a function of the same signature;
            a label of -1 removes a neuron instead of merging it.
        rule: how a merged neuron and what reads it are chosen: `"compensated"`; `"restored"`, without compensation: a
            merged channel with BatchNorm deviates as the merged ones did in the mean; or `"centroid"`, the paper's
            rule: it deviates as their mean does.
        neurons: how they are compared: by their `"activations"` (the default where they are compensated), by their
            weights with BatchNorm `"folded"` in (else the default), or by their bare `"weights"`.
        refine: how often, after compensation, the smaller network looks at each calibration input to learn to answer as
            the original does (see `nac_gpu.refinement`): about as long as the rest takes. 0 leaves it out.
        seed: of methods and dreams that draw numbers; the global random state is not touched.
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
    """
    with joined(process_group, model) as ranks:
        asked = Wanted(width, params, flops, latency, limits, multiple_of, calibration, seed)
        wanted = _wanted(plan, asked, only, skip)
        assign = _method(method)
        for name, value, known in (("rule", rule, get_args(Rule)), ("neurons", neurons, (None, *get_args(Neurons)))):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(k for k in known if k)}")
        way = getattr(assign, "__qualname__", type(assign).__qualname__)
        if refine < 0:
            raise ValueError(f"refine={refine}, expected a number of passes over the calibration inputs, 0 for none")
        given = {"method": way, "rule": rule, "neurons": neurons, "refine": refine, "seed": seed}
        check_arguments(ranks, given)
        prepared = prepare(model, example_inputs, wanted, only, skip, ranks)
        evidence = prepared.evidence
        if evidence is None and (rule == "compensated" or neurons == "activations"):
            evidence = gather(prepared.model, example_inputs, prepared.groups, calibration, seed, ranks)
        small, compensated = _carried_out(prepared, evidence, assign, rule, neurons, seed, ranks)
        if compensated and evidence is not None:
            merged = [g for g, p in zip(prepared.groups, prepared.plan.groups, strict=True) if p.after < p.before]
            made_up = isinstance(calibration, str)
            touched = {member.tensor for group in merged for member in group.members}
            learn(small, prepared.model, touched, evidence.batches, refine, made_up=made_up, seed=seed, ranks=ranks)
        return same_result(small, ranks)


def _carried_out(
    prepared: Prepared,
    evidence: Evidence | None,
    assign: AssignmentMethod,
    rule: Rule,
    neurons: Neurons | None,
    seed: int,
    ranks: Ranks,
) -> tuple[nn.Module, bool]:
    """The smaller model of a plan, and whether it is compensated.

    Clusters by activations are those of the original network, so ranks divide the groups. Clusters by weights depend on
    the groups that were merged before: every rank works them out.
    """
    model, groups = prepared.model, prepared.groups
    widths = [planned.after for planned in prepared.plan.groups]
    compensator = None
    if rule == "compensated" and evidence is not None and evidence.batches:
        # Sums over a batch have many columns squared: a GPU makes them in less time than it takes to send them.
        on_cuda = any(parameter.is_cuda for parameter in model.parameters())
        shared = ALONE if on_cuda else ranks
        compensator = Compensator(model, prepared.graph, evidence.batches, evidence.activities, shared)
        merger = compensator.merger
    else:
        merger = Merger(tensors(model), "centroid" if rule == "centroid" else "restored")
    alike = compensator is not None and evidence is not None and evidence.alike
    acting: list[tuple[Group, int]] = []
    if evidence is not None and (neurons == "activations" or (neurons is None and alike)):
        pairs = zip(groups, widths, strict=True)
        acting = [(g, kept) for g, kept in pairs if kept < g.size and g.name in evidence.activities]

    def by_activations(item: tuple[Group, int]) -> Tensor:
        group, kept = item
        assert evidence is not None, "else nothing acts"
        if assign is ward:
            return evidence.tree(group).cut(kept)
        points, masses = evidence.points(group)
        return assign(points, kept, weights=masses, seed=seed)

    if evidence is not None and assign is ward:
        evidence.cluster(group for group, _ in ranks.own(acting))
    clusters = ranks.share(acting, by_activations)
    names = {group.name for group, _ in acting}
    changed = False
    for group, kept in zip(groups, widths, strict=True):
        if kept == group.size:
            labels = torch.arange(kept)
        elif group.name in names:
            labels = next(clusters)
        else:
            points = neuron_vectors(merger.state, group, fold=neurons != "weights")
            labels = assign(points, kept, seed=seed)
        changed = changed or kept < group.size
        if compensator is not None and changed:
            compensator.merge(group, labels)
        elif kept < group.size:
            merger.merge(group, labels)
    small = rebuild(model, merger.finish(), attributes(model, groups, widths))
    set_configs(small, groups, widths)
    remember(small, model, prepared.plan)
    return small, compensator is not None


def _wanted(plan: Plan | None, wanted: Wanted, only: Names, skip: Names) -> Plan | Wanted:
    """A plan, or what to make one from.

    Raises:
        ValueError: both, or neither.
    """
    if plan is None:
        wanted.check()
        return wanted
    if wanted.width is not None or wanted.budget or wanted.limits is not None or wanted.multiple_of is not None:
        raise ValueError("expected either a plan or width=, params=, flops= or latency=, got both")
    if only is not None or skip:
        raise ValueError(
            "only= and skip= are part of a plan, expected them in nac_gpu.plan(...), got them beside a plan"
        )
    return plan


def _method(method: str | AssignmentMethod) -> AssignmentMethod:
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}, expected one of {', '.join(METHODS)}, or a function")
    return METHODS[method]
