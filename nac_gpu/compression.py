"""`plan` and `compress`, from the user's model to a smaller one.

The steps of a compression: `take` the network; make a plan with `plan_for`, or prepare an existing one with `replay`;
make the smaller network in several ways, take the best and train it (`nac_gpu.assembly.making.made`). Where a step
fails that the result can do without, the next best is done, and the plan says so: see
`nac_gpu.distributed.fallbacks`.
"""

from typing import TYPE_CHECKING

from torch import nn

from nac_gpu.assembly.making import made
from nac_gpu.assembly.settings import MergeSettings, Neurons, Rule
from nac_gpu.calibration.batches import Calibration
from nac_gpu.clustering.methods import AssignmentMethod
from nac_gpu.distributed.consistency import check_arguments, without_values
from nac_gpu.distributed.ranks import joined
from nac_gpu.distributed.replicas import same_result
from nac_gpu.merging.refinement import PASSES
from nac_gpu.network.ambient import undisturbed
from nac_gpu.network.running import ExampleInputs
from nac_gpu.planning.plans import Plan
from nac_gpu.planning.prepare import forget, keep, plan_for, replay
from nac_gpu.planning.request import LimitsByLayer, Names, Request, Share, Width
from nac_gpu.planning.taking import take

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    method: str | AssignmentMethod = "auto",
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
        method: how groups are made smaller: `"ward"` (neurons are merged by agglomerative clustering); `"removal"`
            (those that contribute least to the consumers' outputs are removed); `"mixed"` (the same, but merged where
            they are like one that stays); or `"auto"`, for each group that of the three which loses least on inputs
            that were left out. Without inputs, `"auto"` tries merging and removal on random tokens if the model reads
            tokens, and the others are all `"ward"`. Also `"kmeans"`, `"random"`, `"l1"` (filter
            pruning by bare weights), or a function (see `nac_gpu.AssignmentMethod`); a label of -1 removes a neuron
            instead of merging it.
        rule: how merged neurons and their consumers are computed: `"compensated"` (consumers are refitted,
            unless the answers to inputs that are kept aside are nearer to the original's without that);
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
        small = made(prepared, evidence, settings, lambda: None if plan is None else forget(plan))
        return same_result(small, ranks)
