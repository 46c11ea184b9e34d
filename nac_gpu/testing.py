"""Is a compression of your model right? The test that every network has to pass, for use in your own tests.

Neurons that are copies of others must merge without changing the outputs at all. The library tries each plan in this
way before it promises anything; this test is independent of that trial: other copies, other input values, the merging
of `nac_gpu.compress`, and outputs that are found in containers of any kind.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nac_gpu.merging.attributes import attributes
from nac_gpu.merging.centroids import Merger
from nac_gpu.merging.copies import copy_neurons, random_assignments
from nac_gpu.network.copying import rebuild
from nac_gpu.network.probes import converted
from nac_gpu.network.running import ExampleInputs, call, evaluating
from nac_gpu.network.state import tensors
from nac_gpu.planning.prepare import plan_for
from nac_gpu.planning.request import Request, Width
from nac_gpu.planning.taking import take
from nac_gpu.tracing.graph import Choice

VACUOUS = 1e-6  # copies of neurons that change the outputs by less than this test nothing


def leaves(value: object) -> list[Tensor]:
    """All tensors in a value: in sequences, mappings, dataclasses, in their order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, list | tuple | set):
        return [leaf for item in value for leaf in leaves(item)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [leaf for field in dataclasses.fields(value) for leaf in leaves(getattr(value, field.name))]
    return []


def floating_outputs(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    """All floating tensors that the model returns in eval mode.

    Raises:
        ValueError: there is none, so that nothing could be compared.
    """
    with evaluating(model):
        found = [tensor for tensor in leaves(call(model, inputs)) if tensor.is_floating_point()]
    if not found:
        raise ValueError(f"{type(model).__name__} returned no floating tensor, expected outputs to compare")
    return found


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest deviation of several tensors, each relative to its own largest value; NaN counts as infinite."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if b.numel():
            same = (a == b) | (a.isnan() & b.isnan())  # infinities too
            error = float((a - b).masked_fill(same, 0).abs().max()) / (float(b.nan_to_num(0, 0, 0).abs().max()) or 1.0)
            worst = max(worst, error if error == error else float("inf"))
    return worst


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """As after some training: no BatchNorm statistics of a fresh model, and no parameter that holds one constant.

    Constants of zero (biases, heads, layer scales) become numbers around zero, all others numbers around themselves.

    Args:
        model: changed in place, and given back.
        seed: of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() < 2 or not parameter.is_floating_point():
                continue
            first = float(parameter.flatten()[0])
            if bool((parameter == first).all()):
                parameter.copy_(normal(parameter) * 0.3 + (0.0 if abs(first) < 1e-3 else first))
        for module in model.modules():
            for name in ("running_mean", "running_var"):
                statistic = getattr(module, name, None)
                if isinstance(statistic, Tensor):
                    drawn = normal(statistic)
                    statistic.copy_(drawn * 0.3 if name == "running_mean" else 0.75 + 0.25 * drawn.tanh())
    return model


def other_values(inputs: Any, seed: int) -> Any:
    """Inputs of the same shapes with other values: floating tensors drawn anew, all else as it was."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.is_floating_point() and bool((value < 0).any()):  # else a mask, an adjacency matrix, a share
                return torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
            return value
        if isinstance(value, Mapping):
            return {key: drawn(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(drawn(item) for item in value)
        return value

    return drawn(inputs)


@dataclass(frozen=True)
class Copies:
    """What merging copies of neurons did to the outputs of a network.

    Attributes:
        error: how far the outputs are from those before the merge, relative; infinite if shapes differ.
        effect: how far making the copies had moved the outputs, relative: little means that nothing was tested.
    """

    error: float
    effect: float

    @property
    def vacuous(self) -> bool:
        """Whether the copies changed next to nothing."""
        return not self.effect > VACUOUS


def check_copies(
    model: nn.Module, example_inputs: ExampleInputs, *, width: Width = 0.5, seed: int = 0, tolerance: float = 1e-8
) -> Copies:
    """Whether copies of neurons merge without changing what a model returns, in float64.

    Args:
        model: as for `nac_gpu.plan`; not changed.
        example_inputs: as for `nac_gpu.plan`; their shapes matter, other values are used.
        width: as for `nac_gpu.plan`: how many neurons of each group stay different, the others become copies of them.
        seed: of the choice of copies.
        tolerance: how far the outputs may move, relative to their largest value.

    Returns:
        By how much the outputs moved, and how far making the copies had moved them.

    Raises:
        AssertionError: the outputs moved by more than `tolerance`, or the copies changed next to nothing, so that
            nothing was tested (`randomise` helps where weights are zero).
        ValueError: as `nac_gpu.plan`.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> check_copies(model, torch.zeros(2, 8)).error < 1e-8
    True
    """
    prepared = plan_for(take(model, example_inputs), Request(width=width))
    found = merge_copies(prepared.model, example_inputs, prepared.choices, seed)
    if found.vacuous:
        raise AssertionError(
            f"copies of neurons moved the outputs by {found.effect:.1e} only, expected more than {VACUOUS:.0e}: "
            "nothing was tested; call nac_gpu.testing.randomise(model) first where weights are zero"
        )
    if not found.error <= tolerance:
        raise AssertionError(
            f"merging copies of neurons moved the outputs by {found.error:.1e}, expected at most {tolerance:.0e}; "
            "please report the model"
        )
    return found


def merge_copies(model: nn.Module, inputs: ExampleInputs, choices: Sequence[Choice], seed: int = 1) -> Copies:
    """Make copies of random neurons in every group at once, merge them, and compare, in float64.

    Args:
        model: the network itself, as `nac_gpu.planning.prepare.plan_for` gives it; not changed.
        inputs: their shapes matter; other values are used.
        choices: groups, and how many neurons of each stay different.
        seed: of the choice of copies.
    """
    double, inputs = converted(model, other_values(inputs, seed), torch.float64)
    labels = random_assignments(choices, seed)
    copies = tensors(double)
    for choice, own in zip(choices, labels, strict=True):
        copies = copy_neurons(copies, choice.group, own)
    merger = Merger(copies)
    for choice, own in zip(choices, labels, strict=True):
        merger.merge(choice.group, own)
    before = floating_outputs(double, inputs)
    expected = floating_outputs(rebuild(double, copies), inputs)
    found = floating_outputs(rebuild(double, merger.finish(), attributes(double, choices)), inputs)
    return Copies(difference(found, expected), difference(before, expected))
