"""Finding the plan of a compressed model: stored with it, or inferred from the shapes of its tensors."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from nac_gpu.files.origin import origin_of
from nac_gpu.network.running import ExampleInputs
from nac_gpu.network.state import tensors
from nac_gpu.network.unwrapping import computed, unwrapped
from nac_gpu.planning.plans import Plan
from nac_gpu.planning.prepare import Prepared, plan_for, replay
from nac_gpu.planning.request import Request
from nac_gpu.planning.taking import take
from nac_gpu.tracing.graph import Group

_ADVICE = "give the model and the plan that it was made with"


def matched(
    model: nn.Module, small: nn.Module, example_inputs: ExampleInputs, plan: Plan | None, request: Request
) -> Prepared:
    """Prepare the plan that turned `model` into `small`.

    Args:
        model: the original.
        small: the compressed model, without wrappers and parametrisations.
        example_inputs: what both are called with.
        plan: by default the one stored with `small`; if there is none, it is inferred, which needs a second trial.
        request: its `calibration` and `seed` define the evidence.

    Raises:
        ValueError: `small` was not made from `model`, or not with this plan; or the shapes do not determine the widths.
    """
    _check_names(plain(model), small)
    network = take(model, example_inputs)
    origin = origin_of(small)
    if plan is None and origin is not None:
        with contextlib.suppress(ValueError):  # the stored plan may belong to an earlier compression
            return _checked(replay(network, origin.plan, request), small)
    if plan is None:
        prepared = plan_for(network, Request(width=0.5))
        widths = _widths(prepared, small)
        groups = tuple(replace(g, after=kept) for g, kept in zip(prepared.plan.groups, widths, strict=True))
        plan = replace(prepared.plan, groups=groups)
    return _checked(replay(network, plan, request), small)


def plain(model: nn.Module) -> nn.Module:
    """The network without wrappers and parametrisations."""
    return computed(unwrapped(model)[0])[0]


def _widths(prepared: Prepared, small: nn.Module) -> list[int]:
    """The number of neurons that each group kept, from a linear system: several groups may share one dimension.

    Raises:
        ValueError: it has no solution, or more than one.
    """
    before, after = _shapes(prepared.model), _shapes(small)
    rows: dict[tuple[str, int], np.ndarray] = {}
    for number, group in enumerate(prepared.groups):
        for member in group.members:
            row = rows.setdefault((member.tensor, member.dim), np.zeros(len(prepared.groups)))
            row[number] += member.index.shape[1]
    known = [(name, dim) for name, dim in rows if len(after[name]) == len(before[name])]
    lost = np.array([before[name][dim] - after[name][dim] for name, dim in known], dtype=float)
    system = np.array([rows[key] for key in known]).reshape(len(known), len(prepared.groups))
    gone, _, rank, _ = np.linalg.lstsq(system, lost, rcond=None)
    if rank < len(prepared.groups):
        raise ValueError("the sizes of small do not tell how many neurons each group kept; give plan=")
    widths = [group.size - round(count) for group, count in zip(prepared.groups, gone.tolist(), strict=True)]
    for group, kept in zip(prepared.groups, widths, strict=True):
        if not 1 <= kept <= group.size:
            raise ValueError(
                f"small has {kept} neurons of {group.name}, expected 1 to {group.size}: it was not made of model; "
                f"{_ADVICE}"
            )
    return widths


def _check_names(model: nn.Module, small: nn.Module) -> None:
    """Check that both models have tensors of the same names.

    Raises:
        ValueError: names the first tensor that one of them lacks.
    """
    before, after = tensors(model), tensors(small)
    other = next((name for name in [*before, *after] if (name in before) != (name in after)), None)
    if other is not None:
        where = "small" if other in before else "model"
        raise ValueError(
            f"{where} has no tensor {other}, expected a model and what nac_gpu.compress made of it; {_ADVICE}"
        )


def _checked(prepared: Prepared, small: nn.Module) -> Prepared:
    """Check that every tensor of the compressed model has the shape that the plan results in.

    Raises:
        ValueError: names the first tensor of another shape.
    """
    before, after = _shapes(prepared.model), _shapes(small)
    expected = {name: list(shape) for name, shape in before.items()}
    for group, planned in zip(prepared.groups, prepared.plan.groups, strict=True):
        _shrink(expected, group, planned.after)
    for name, shape in expected.items():
        if tuple(shape) != tuple(after[name]):
            raise ValueError(
                f"{name} is {tuple(after[name])} in small, expected {tuple(shape)} by the plan "
                f"(it is {tuple(before[name])} in model); {_ADVICE}"
            )
    return prepared


def _shrink(shapes: dict[str, list[int]], group: Group, kept: int) -> None:
    for member in group.members:
        shapes[member.tensor][member.dim] -= (group.size - kept) * member.index.shape[1]


def _shapes(model: nn.Module) -> dict[str, Sequence[int]]:
    return {name: tensor.shape for name, tensor in tensors(model).items()}
