"""Sensitivity: how much the model's outputs change when one group alone is merged.

The error e(k) of a group (see `nac_gpu.planning.allocation`) does not tell how strongly it affects the outputs. So each
group is merged and compensated at a few errors, and the change of the outputs is measured relative to their variance
over the inputs. Between these points the change is interpolated as a power of e.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from nac_gpu.calibration.batches import Batches, first_batches, of_tokens, size_of
from nac_gpu.calibration.curves import Curve
from nac_gpu.calibration.evidence import Evidence
from nac_gpu.distributed.fallbacks import StepError, attempt
from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.merging.compensation import Compensator
from nac_gpu.network.copying import copied, in_float32
from nac_gpu.network.judging import all_answers, judged
from nac_gpu.network.running import ExampleInputs
from nac_gpu.tracing.graph import Graph, Group

_TRIED = (0.1, 0.3, 0.6)  # errors at which the change of the outputs is measured
_TRIED_ONCE = (0.1,)  # the same where a pass is dear
_INPUTS, _TOKENS = 256, 4096  # enough for a measurement
_MOST_FLOPS = 2e13  # of all passes of smaller networks: some minutes on two cores
_NARROWEST = 4  # budgets often keep one of so many neurons, or more
_STEEPEST, _FLATTEST = 4.0, 1.0  # bounds of the exponent of e: both are variances
_MOST = 12.0  # upper bound of a loss


def losses(
    model: nn.Module,
    inputs: ExampleInputs,
    graph: Graph,
    groups: Sequence[Group],
    evidence: Evidence,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, Curve], str]:
    """The loss of merging each group to k neurons, by name and k; comparable between groups.

    Without activations, or if the change of the outputs cannot be measured, it is `e / (1 - e)` of the group's own
    error: steep enough that no group is given up for the others.

    Args:
        model: not changed, and not run.
        inputs: what it was recorded on.
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
        name: {k: error / (1 - error) for k, error in curve.items()} for name, curve in curves.items()
    }
    if not evidence.batches:
        return plain, ""
    why = "the outputs cannot be compared"
    try:
        measured = attempt(lambda ranks: _measured(model, inputs, graph, groups, evidence, curves, ranks), ranks)
    except StepError as error:
        measured, why = None, f"measuring how the outputs change failed ({error})"
    if measured is None:
        return plain, f"widths are chosen by the errors of the groups alone, because {why}"
    for name, points in measured.items():
        plain[name] = _through(points, curves[name]) if points else plain[name]
    return plain, ""


def _measured(
    model: nn.Module,
    inputs: ExampleInputs,
    graph: Graph,
    groups: Sequence[Group],
    evidence: Evidence,
    curves: Mapping[str, Curve],
    ranks: Ranks,
) -> dict[str, dict[float, float]] | None:
    """By group, changes of the outputs by the error of the group; None if the outputs cannot be compared."""
    model = in_float32(model) if evidence.float32 else model
    amount = _amount(graph.flops, inputs, evidence.batches, len(groups))
    seen = first_batches(evidence.batches, amount.inputs)
    compensator = Compensator(model, graph, seen, evidence.activities, refit="alone")  # each group alone
    # First those to which nothing is fitted: with few inputs, wide groups reproduce the others almost exactly.
    batches, run = first_batches((*evidence.judged, *evidence.batches), amount.inputs), copied(model)

    known = attempt(lambda _: all_answers(run, batches), ranks)

    def measured(group: Group) -> dict[float, float] | None:
        curve = curves[group.name]
        points: dict[float, float] = {}
        for kept in _widths(curve, group, amount) if group.name in evidence.activities else ():
            if kept < group.size and curve[kept] > 0 and curve[kept] not in points:
                compensator.start()
                compensator.merge(group, evidence.likely(group, kept))
                changed = judged(compensator.network(), batches, known)
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


@dataclass(frozen=True)
class _Amount:
    """How much is measured.

    Attributes:
        inputs: how many, or tokens, where inputs are sequences of them.
        errors: of a group, at which it is merged.
    """

    inputs: int
    errors: tuple[float, ...]


def _widths(curve: Curve, group: Group, amount: _Amount) -> list[int]:
    """Widths at which a group is measured.

    One of them is near those that budgets ask for: what a few neurons lose says little about half of them.
    """
    near = [kept for kept in curve if kept >= group.size / _NARROWEST] or list(curve)
    found = [min(near)] if len(amount.errors) > 1 else []
    for error in amount.errors:
        found.append(min(curve if found else near, key=lambda k: abs(math.log(max(curve[k], 1e-9) / error))))
    return found


def _amount(flops: int, inputs: ExampleInputs, batches: Batches, groups: int) -> _Amount:
    """What can be measured with so many operations: the same on every machine, and on every rank.

    Args:
        flops: of a pass.
        inputs: of that pass.
        batches: the inputs that there are.
        groups: how many groups are measured.
    """
    one = flops / size_of(inputs)  # of an input, or of a token
    whole = _TOKENS if of_tokens(batches) else _INPUTS
    most = {errors: _MOST_FLOPS / max(1.0, one * groups * len(errors)) for errors in (_TRIED, _TRIED_ONCE)}
    errors = _TRIED if most[_TRIED] >= whole / 4 else _TRIED_ONCE
    return _Amount(max(1, min(whole, int(most[errors]))), errors)


def _through(points: dict[float, float], curve: Curve) -> Curve:
    """Losses at all widths, piecewise linear in the logarithms of the measured points."""
    known = sorted((math.log(error), math.log(change)) for error, change in points.items())
    errors, changes = [x for x, _ in known], [y for _, y in known]

    def loss(error: float) -> float:
        if error <= 0:
            return 0.0
        x = math.log(error)
        left = max(0, min(sum(e <= x for e in errors) - 1, len(known) - 2))
        slope = 1.0  # the error is a variance, and so is the change
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
