"""`compress`: plan, cluster, merge, rebuild."""

from typing import get_args

from torch import nn

from nac_gpu.clustering import METHODS, AssignmentMethod
from nac_gpu.forward import ExampleInputs
from nac_gpu.merge import Merger, Rule
from nac_gpu.neurons import neuron_vectors
from nac_gpu.plan import Names, Plan, Width, prepare
from nac_gpu.rebuild import rebuild, tensors
from nac_gpu.sizes import attributes, set_configs


def compress(
    model: nn.Module,
    example_inputs: ExampleInputs,
    plan: Plan | None = None,
    *,
    width: Width | None = None,
    only: Names = None,
    skip: Names = (),
    method: str | AssignmentMethod = "ward",
    fold: bool = True,
    rule: Rule = "restored",
    seed: int = 0,
) -> nn.Module:
    """A smaller copy of a trained model: similar neurons of every layer become one.

    Layer by layer, in the order of the forward pass: the neurons' weights are clustered, each cluster becomes its
    centroid, the outgoing connections are summed (Algorithm 1 of Wang et al. 2020). No data is needed. The copy is
    dense and of the same classes (but for `nn.MultiheadAttention`, see `nac_gpu.attention`); fine-tune it as any model.
    The original is not changed.

    Args:
        model: any module whose forward pass runs on the example inputs.
        example_inputs: what the model is called with: a tensor, a sequence of arguments, or a mapping of keyword
            arguments.
        plan: made by `nac_gpu.plan` for this model; else give `width`.
        width: as for `nac_gpu.plan`.
        only: as for `nac_gpu.plan`.
        skip: as for `nac_gpu.plan`.
        method: `"ward"` (agglomerative clustering), `"kmeans"`, `"random"`, or a function of the same signature;
            a label of -1 removes a neuron instead of merging it.
        fold: compare neurons as what they compute in eval mode, BatchNorm folded in; without, by their bare weights.
        rule: how much a merged channel with BatchNorm deviates: `"restored"`, as the merged ones did in the mean,
            which is much better without fine-tuning; or `"centroid"`, the paper's rule, as their mean does.
        seed: of methods that draw numbers; the global random state is not touched.

    Returns:
        A new module: the original's device, dtype, mode, `requires_grad` and hooks, smaller tensors.

    Raises:
        ValueError: as `nac_gpu.plan`; also an unknown method, both or neither of `plan` and `width`, or a plan that
            was made for another model.
        TypeError: integer or complex weights.
        RuntimeError: the forward pass fails on the example inputs.
    """
    if (plan is None) == (width is None):
        raise ValueError("expected either a plan or width=, got " + ("neither" if plan is None else "both"))
    if plan is not None and (only is not None or skip):
        raise ValueError(
            "only= and skip= are part of a plan, expected them in nac_gpu.plan(...), got them beside a plan"
        )
    if isinstance(method, str) and method not in METHODS:
        raise ValueError(f"unknown method {method!r}, expected one of {', '.join(METHODS)}, or a function")
    if rule not in get_args(Rule):
        raise ValueError(f"unknown rule {rule!r}, expected one of {', '.join(get_args(Rule))}")
    assign = METHODS[method] if isinstance(method, str) else method
    wanted = plan if plan is not None else width
    assert wanted is not None, "checked above"
    prepared = prepare(model, example_inputs, wanted, only, skip)
    model, groups = prepared.model, prepared.groups
    widths = [planned.after for planned in prepared.plan.groups]
    merger = Merger(tensors(model), rule)
    for group, kept in zip(groups, widths, strict=True):
        if kept == group.size:
            continue
        points = neuron_vectors(merger.state, group, fold=fold)
        merger.merge(group, assign(points, kept, seed=seed))
    small = rebuild(model, merger.finish(), attributes(model, groups, widths))
    set_configs(small, groups, widths)
    return small
