"""What was done to a model, read off the compressed one: its tensors' sizes say how many neurons each group kept."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from nac_gpu.forward import ExampleInputs
from nac_gpu.groups import Group
from nac_gpu.plan import Plan, Prepared, prepare
from nac_gpu.rebuild import tensors
from nac_gpu.unwrap import computed, unwrapped
from nac_gpu.widths import Wanted

_ADVICE = "give the model and the plan that it was made with"


def matched(model: nn.Module, small: nn.Module, example_inputs: ExampleInputs, plan: Plan | None) -> Prepared:
    """The plan that made `small` of `model`, with the groups that it speaks of.

    Args:
        model: the original.
        small: the compressed model, without wrappers and parametrisations.
        example_inputs: what both are called with.
        plan: where it is known; else it is found out, which costs a second trial.

    Raises:
        ValueError: `small` was not made of `model`, or not by this plan; or the sizes leave open by which.
    """
    _check_names(plain(model), small)
    if plan is None:
        prepared = prepare(model, example_inputs, Wanted(width=0.5))
        widths = _widths(prepared, small)
        groups = tuple(replace(g, after=kept) for g, kept in zip(prepared.plan.groups, widths, strict=True))
        plan = replace(prepared.plan, groups=groups)
    prepared = prepare(model, example_inputs, plan)
    _check(prepared, small)
    return prepared


def plain(model: nn.Module) -> nn.Module:
    """The network itself: without wrappers, with the weights that it really computes with."""
    return computed(unwrapped(model)[0])[0]


def _widths(prepared: Prepared, small: nn.Module) -> list[int]:
    """How many neurons each group kept: a linear system, for several groups may run through one dimension.

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
    """Whether both have the same tensors, of whatever sizes.

    Raises:
        ValueError: naming the first that one of them lacks.
    """
    before, after = tensors(model), tensors(small)
    other = next((name for name in [*before, *after] if (name in before) != (name in after)), None)
    if other is not None:
        where = "small" if other in before else "model"
        raise ValueError(
            f"{where} has no tensor {other}, expected a model and what nac_gpu.compress made of it; {_ADVICE}"
        )


def _check(prepared: Prepared, small: nn.Module) -> None:
    """Whether every tensor of the compressed model has the size that the plan gives it.

    Raises:
        ValueError: naming the first that has not.
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


def _shrink(shapes: dict[str, list[int]], group: Group, kept: int) -> None:
    for member in group.members:
        shapes[member.tensor][member.dim] -= (group.size - kept) * member.index.shape[1]


def _shapes(model: nn.Module) -> dict[str, Sequence[int]]:
    return {name: tensor.shape for name, tensor in tensors(model).items()}
