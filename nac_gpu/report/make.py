"""`report`: measures both models, works out again what the compression saw, and puts it together."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from nac_gpu.cost import cost
from nac_gpu.dendrogram import Dendrogram
from nac_gpu.evidence import Evidence, gather
from nac_gpu.forward import ExampleInputs, describe, device_of
from nac_gpu.plan import Plan, Prepared
from nac_gpu.report.contents import GroupCurve, Report, Size, Tree
from nac_gpu.report.filters import first_filters
from nac_gpu.report.machine import environment
from nac_gpu.report.matching import matched, plain
from nac_gpu.report.measure import accuracy, bytes_on_disk
from nac_gpu.timing import timings
from nac_gpu.unwrap import unwrapped
from nac_gpu.widths import Calibration


def report(
    model: nn.Module,
    small: nn.Module,
    example_inputs: ExampleInputs,
    *,
    plan: Plan | None = None,
    calibration: Calibration = "dream",
    data: Iterable[Any] | None = None,
    layer: str | None = None,
    batch_sizes: Sequence[int] = (1, 64),
    seconds: float = 10.0,
    seed: int = 0,
    title: str | None = None,
) -> Report:
    """What a compression did: sizes, times, accuracy, widths, what merging cost, what was left alone and why.

    Both models are measured on the device where they are. What the neurons were compared by is worked out again, which
    takes as long as it did when the model was compressed; with the same calibration and seed it is the same. Neither
    model is changed.

    Args:
        model: the original.
        small: what `nac_gpu.compress` made of it; it may have been fine-tuned since.
        example_inputs: what both are called with; to time them the inputs are repeated along their first dimension.
        plan: what `small` was made with. Where it is not given, widths are found by comparing the tensors of both
            models; what was left alone on request counts as kept whole then.
        calibration: what `small` was made with: batches of unlabelled inputs, `"dream"`, or `"none"` to compare neurons
            by their weights, which is quick.
        data: batches (inputs, labels) to count right answers on; see `nac_gpu.report.measure.accuracy`.
        layer: whose dendrogram to draw; by default the first whose neurons were merged. Curves and dendrogram are
            Ward's on the original, as `nac_gpu.compress` clusters by default.
        batch_sizes: numbers of inputs in the passes that are timed; one at which the models do not run is noted.
        seconds: how long to time, in all; at least five passes are made at each batch size.
        seed: what `small` was made with.
        title: headline; by default the name of the model's class.

    Raises:
        ValueError: `small` was not made of `model` by this plan, or is on another device; an unknown layer, a batch
            size or a time below what is possible, data without batches or whose labels fit no output, or as
            `nac_gpu.plan`.
        TypeError: data that is not made of pairs, or as `nac_gpu.plan`.
        RuntimeError: a forward pass fails on the example inputs, the calibration data or the data.
    """
    wrong = next(
        (size for size in batch_sizes if isinstance(size, bool) or not isinstance(size, int) or size < 1), None
    )
    if wrong is not None:
        raise ValueError(f"batch size {wrong!r}, expected whole numbers from 1")
    if not seconds > 0:
        raise ValueError(f"seconds={seconds!r}, expected more than 0: how long to time")
    devices = device_of(model), device_of(small)
    if devices[0] != devices[1]:
        raise ValueError(f"small is on {devices[1]}, expected it on {devices[0]} beside model: move one of them")
    network, small_network = plain(model), plain(small)
    prepared = matched(model, small_network, example_inputs, plan)
    chosen = _chosen(prepared, layer)
    answers = None if data is None else accuracy(model, small, data)
    evidence = gather(prepared.model, example_inputs, prepared.groups, calibration, seed)
    measured, failed = timings(model, small, example_inputs, batch_sizes, seconds)
    return Report(
        title=title or f"{type(unwrapped(model)[0]).__name__}, compressed",
        inputs=describe(example_inputs),
        plan=prepared.plan,
        before=_size(network, example_inputs),
        after=_size(small_network, example_inputs),
        timings=tuple(measured),
        accuracy=answers,
        curves=tuple(
            GroupCurve(planned, evidence.curve(group), group.name in evidence.activities)
            for group, planned in zip(prepared.groups, prepared.plan.groups, strict=True)
        ),
        tree=_tree(prepared, chosen, evidence),
        filters=first_filters(prepared, small_network, example_inputs, evidence),
        evidence=evidence.source,
        environment=environment(devices[0]),
        notes=tuple(failed),
    )


def _size(model: nn.Module, example_inputs: ExampleInputs) -> Size:
    spent = cost(model, example_inputs)
    return Size(spent.parameters, spent.flops, bytes_on_disk(model))


def _chosen(prepared: Prepared, layer: str | None) -> int:
    """The number of the group to draw.

    Raises:
        ValueError: no group has this layer.
    """
    planned = prepared.plan.groups
    if layer is None:
        return next((number for number, group in enumerate(planned) if group.after < group.before), 0)
    named = [number for number, group in enumerate(planned) if layer == group.name]
    made = [number for number, group in enumerate(planned) if layer in group.layers]
    if named or made:
        return (named or made)[0]
    alone = next((alone for alone in prepared.plan.left_alone if alone.layer == layer), None)
    known = ", ".join(group.name for group in planned)
    why = f"{layer} was left alone: {alone.reason}" if alone else f"unknown layer {layer!r}"
    raise ValueError(f"{why}; expected layer= to be one of: {known}")


def _tree(prepared: Prepared, number: int, evidence: Evidence) -> Tree:
    planned = prepared.plan.groups[number]
    found = evidence.tree(prepared.groups[number])
    tree = Dendrogram(found.merges.cpu(), found.heights.cpu(), found.sizes.cpu())
    return Tree(planned, tree, tree.cut(planned.after))
