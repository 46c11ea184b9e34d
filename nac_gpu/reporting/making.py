"""`report`: measures both models and recomputes the evidence of the compression."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from nac_gpu.calibration.batches import Calibration
from nac_gpu.calibration.evidence import Evidence
from nac_gpu.clustering.dendrogram import Dendrogram
from nac_gpu.files.origin import origin_of
from nac_gpu.network.ambient import drawn, undisturbed
from nac_gpu.network.copying import copied
from nac_gpu.network.counting import cost
from nac_gpu.network.machine import environment
from nac_gpu.network.running import ExampleInputs, describe, device_of
from nac_gpu.network.timing import timings
from nac_gpu.network.unwrapping import unwrapped
from nac_gpu.planning.plans import Plan
from nac_gpu.planning.prepare import Prepared
from nac_gpu.planning.request import Request
from nac_gpu.reporting.contents import GroupCurve, Report, Size, Tree
from nac_gpu.reporting.filters import first_filters
from nac_gpu.reporting.matching import matched, plain
from nac_gpu.reporting.measuring import accuracy, bytes_on_disk

#: Default seconds of timing, by batch size.
TIMED: Mapping[int, float] = MappingProxyType({1: 5.0, 64: 5.0})


@undisturbed()
def report(
    model: nn.Module,
    small: nn.Module,
    example_inputs: ExampleInputs,
    *,
    plan: Plan | None = None,
    calibration: Calibration = "dream",
    data: Iterable[Any] | None = None,
    layer: str | None = None,
    timed: Mapping[int, float] = TIMED,
) -> Report:
    """Report on a compression: sizes, times, accuracy, widths, errors, and what was left alone and why.

    Both models are measured on their device. The evidence about the neurons is gathered again, which takes as long as
    it took for the compression. To change the title: `dataclasses.replace(report, title=...)`.

    Args:
        model: the original.
        small: the model that `nac_gpu.compress` returned; it may have been fine-tuned since.
        example_inputs: what both are called with; for timing they are repeated along their first dimension.
        plan: the plan of `small`. By default the one stored with the model; if there is none, the widths are inferred
            from the shapes of both models.
        calibration: as for the compression; `"none"` to compare neurons by their weights, which is quick.
        data: batches (inputs, labels) for measuring the accuracy.
        layer: draw the dendrogram of this layer; by default the first whose neurons were merged.
        timed: seconds of timing by batch size; at least five passes are made.

    Raises:
        ValueError: `small` was not made from `model` with this plan, or is on another device; an unknown layer; a batch
            size or time out of range; empty data, or labels that fit no output; or as `nac_gpu.plan`.
        TypeError: data that does not consist of pairs, or as `nac_gpu.plan`.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> small = nac_gpu.compress(model, torch.zeros(1, 8), width=0.25, calibration="none")
    >>> nac_gpu.report(model, small, torch.zeros(1, 8), calibration="none", timed={}).after.parameters
    108
    """
    device = _checked(model, small, timed)
    network, small_network = plain(model), plain(small)
    request = Request(calibration=calibration, seed=getattr(origin_of(small_network), "seed", 0))
    prepared = matched(model, small_network, example_inputs, plan, request)
    chosen = _chosen(prepared, layer)
    evidence = prepared.known(request)
    run, small_run = _to_run(model), _to_run(small)
    measured, failed = timings(run, small_run, example_inputs, timed)
    return Report(
        title=f"{type(unwrapped(model)[0]).__name__}, compressed",
        inputs=describe(example_inputs),
        plan=prepared.plan,
        before=_size(network, example_inputs),
        after=_size(small_network, example_inputs),
        timings=tuple(measured),
        accuracy=None if data is None else accuracy(run, small_run, drawn(data)),
        curves=_curves(prepared, evidence),
        tree=_tree(prepared, chosen, evidence),
        filters=first_filters(prepared, small_network, example_inputs, evidence),
        evidence=evidence.source,
        environment=environment(device),
        notes=tuple(failed),
    )


def _to_run(model: nn.Module) -> nn.Module:
    """A copy, which the model's code may change; a wrapped model (compiled, for example) itself."""
    return copied(model) if unwrapped(model)[0] is model else model


def _checked(model: nn.Module, small: nn.Module, timed: Mapping[int, float]) -> torch.device:
    """The device of both models.

    Raises:
        ValueError: they are on different devices, or a batch size or time is out of range.
    """
    devices = device_of(model), device_of(small)
    if devices[0] != devices[1]:
        raise ValueError(f"small is on {devices[1]}, expected it on {devices[0]} beside model: move one of them")
    for size, seconds in timed.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"timed has the batch size {size!r}, expected whole numbers from 1")
        if not seconds > 0:
            raise ValueError(f"timed has {seconds!r} seconds at batch size {size}, expected more than 0")
    return devices[0]


def _curves(prepared: Prepared, evidence: Evidence) -> tuple[GroupCurve, ...]:
    return tuple(
        GroupCurve(planned, evidence.curve(group), group.name in evidence.activities)
        for group, planned in zip(prepared.groups, prepared.plan.groups, strict=True)
    )


def _size(model: nn.Module, example_inputs: ExampleInputs) -> Size:
    spent = cost(model, example_inputs)
    return Size(spent.parameters, spent.flops, bytes_on_disk(model))


def _chosen(prepared: Prepared, layer: str | None) -> int:
    """The index of the group whose dendrogram is drawn.

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
