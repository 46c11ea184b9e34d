"""Sensitivity: how much the model's outputs change when one group alone is merged.

The error e(k) of a group (see `nac_gpu.planning.allocation`) does not tell how strongly it affects the outputs. So each
group is merged and compensated at a few errors, and the change of the outputs is measured relative to their variance
over the inputs. Between these points the change is interpolated as a power of e.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nac_gpu.calibration.batches import Batches
from nac_gpu.calibration.curves import Curve
from nac_gpu.calibration.evidence import Evidence
from nac_gpu.distributed.fallbacks import StepError, attempt
from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.merging.compensation import Compensator
from nac_gpu.network.comparing import change, mean_change
from nac_gpu.network.copying import copied, in_float32
from nac_gpu.network.reaching import tensors_in
from nac_gpu.network.running import call, evaluating
from nac_gpu.tracing.graph import Graph, Group

_TRIED = (0.03, 0.1, 0.3)  # errors at which the change of the outputs is measured
_INPUTS = 256  # enough inputs for a measurement, if batches are tensors
_STEEPEST, _FLATTEST = 4.0, 0.5  # bounds of the exponent of e
_MOST = 12.0  # upper bound of a loss


def losses(
    model: nn.Module, graph: Graph, groups: Sequence[Group], evidence: Evidence, ranks: Ranks = ALONE
) -> tuple[dict[str, Curve], str]:
    """The loss of merging each group to k neurons, by name and k; comparable between groups.

    Without activations, or if the change of the outputs cannot be measured, it is `-log(1 - e)` of the group's own
    error.

    Args:
        model: not changed, and not run.
        graph: its record.
        groups: the groups.
        evidence: about their neurons.
        ranks: the processes that divide the groups among them.

    Returns:
        The losses, and a line for the plan that says why nothing was measured; empty if it was, or without activations.

    Raises:
        RankError: another rank failed or was lost.
    """
    curves = evidence.curves(groups, ranks)
    plain: dict[str, Curve] = {
        name: {k: -math.log1p(-error) for k, error in curve.items()} for name, curve in curves.items()
    }
    if not evidence.batches:
        return plain, ""
    why = "the outputs cannot be compared"
    try:
        measured = attempt(lambda ranks: _measured(model, graph, groups, evidence, curves, ranks), ranks)
    except StepError as error:
        measured, why = None, f"measuring how the outputs change failed ({error})"
    if measured is None:
        return plain, f"widths are chosen by the errors of the groups alone, because {why}"
    for name, points in measured.items():
        plain[name] = _through(points, curves[name]) if points else plain[name]
    return plain, ""


def _measured(
    model: nn.Module,
    graph: Graph,
    groups: Sequence[Group],
    evidence: Evidence,
    curves: Mapping[str, Curve],
    ranks: Ranks,
) -> dict[str, dict[float, float]] | None:
    """By group, changes of the outputs by the error of the group; None if the outputs cannot be compared."""
    model, batches = in_float32(model) if evidence.float32 else model, _some(evidence.batches)
    compensator = Compensator(model, graph, batches, evidence.activities)
    run = copied(model)

    def answers(_: Ranks) -> list[list[Tensor]]:
        with evaluating(run):
            return [_outputs(run, batch) for batch in batches]

    expected = attempt(answers, ranks)

    def measured(group: Group) -> dict[float, float] | None:
        curve = curves[group.name]
        points: dict[float, float] = {}
        for error in _TRIED if group.name in evidence.activities else ():
            kept = min(curve, key=lambda k: abs(math.log(max(curve[k], 1e-9) / error)))
            if kept < group.size and curve[kept] > 0 and curve[kept] not in points:
                compensator.start()
                compensator.merge(group, evidence.tree(group).cut(kept))
                changed = _changed(compensator.network(), batches, expected)
                if changed is None:
                    return None
                points[curve[kept]] = max(changed, 1e-9)
        return points

    result: dict[str, dict[float, float]] = {}
    for group, points in zip(groups, ranks.share(groups, measured), strict=True):
        if points is None:
            return None
        result[group.name] = points
    return result


def _some(batches: Batches) -> Batches:
    """The first batches, until they have enough inputs."""
    chosen: list[Any] = []
    count = 0
    for batch in batches:
        chosen.append(batch)
        count += len(batch) if isinstance(batch, Tensor) else 1
        if count >= _INPUTS:
            break
    return chosen


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    return [value.double() if value.is_floating_point() else value for value in tensors_in(call(model, batch))]


def _changed(model: nn.Module, batches: Batches, expected: Sequence[Sequence[Tensor]]) -> float | None:
    """The mean change of the outputs over the batches; None if they cannot be compared."""
    with evaluating(model):
        pairs = zip(batches, expected, strict=True)
        return mean_change(change(_outputs(model, batch), wanted) for batch, wanted in pairs)


def _through(points: dict[float, float], curve: Curve) -> Curve:
    """Losses at all widths, piecewise linear in the logarithms of the measured points."""
    known = sorted((math.log(error), math.log(change)) for error, change in points.items())
    errors, changes = [x for x, _ in known], [y for _, y in known]

    def loss(error: float) -> float:
        if error <= 0:
            return 0.0
        x = math.log(error)
        left = max(0, min(sum(e <= x for e in errors) - 1, len(known) - 2))
        slope = 1.5
        if len(known) > 1:
            slope = (changes[left + 1] - changes[left]) / (errors[left + 1] - errors[left])
            slope = min(max(slope, _FLATTEST), _STEEPEST)
        near = left if x < errors[min(left + 1, len(known) - 1)] else min(left + 1, len(known) - 1)
        return min(math.exp(min(changes[near] + slope * (x - errors[near]), 50.0)), _MOST)

    result, worst = {}, 0.0
    for kept in sorted(curve, reverse=True):
        worst = max(worst, loss(curve[kept]))
        result[kept] = worst
    return result
