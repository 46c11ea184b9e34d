"""The copies test as a public tool: use it in your own tests to check that your model is compressed correctly.

Neurons that are copies of others must merge without changing the outputs. `nac_gpu.plan` tests every plan in this way,
too. This test is independent of that trial: it uses other copies, other input values, the merging code of
`nac_gpu.compress`, and its own search for outputs in nested containers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nac_gpu.merging.attributes import attributes
from nac_gpu.merging.centroids import Merger
from nac_gpu.merging.copies import copy_neurons, random_assignments
from nac_gpu.network.ambient import undisturbed
from nac_gpu.network.comparing import relative_error
from nac_gpu.network.copying import converted, rebuild
from nac_gpu.network.probes import in_one_type
from nac_gpu.network.reaching import tensors_in
from nac_gpu.network.running import ExampleInputs, call, evaluating
from nac_gpu.network.state import tensors
from nac_gpu.planning.prepare import plan_for
from nac_gpu.planning.request import Request, Width
from nac_gpu.planning.taking import take
from nac_gpu.tracing.graph import Choice

VACUOUS = 1e-6  # if the copies change the outputs by less than this, the test is meaningless


def floating_outputs(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    """All floating and complex tensors that the model returns in eval mode.

    Raises:
        ValueError: there is none to compare.
    """
    with evaluating(model):
        found = [
            tensor for tensor in tensors_in(call(model, inputs)) if tensor.is_floating_point() or tensor.is_complex()
        ]
    if not found:
        raise ValueError(f"{type(model).__name__} returned no floating tensor, expected outputs to compare")
    return found


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Randomise the initial values that would hide errors: BatchNorm statistics, and parameters that are constant.

    Constant parameters (zero biases, layer scales) become random numbers around their constant.

    Args:
        model: changed in place and returned.
        seed: of the random numbers.

    >>> model = nac_gpu.testing.randomise(nn.BatchNorm1d(8))
    >>> bool((model.bias != 0).all())
    True
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
    """Inputs of the same shapes with other values: floating tensors are drawn again, all else is unchanged."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(value: Any) -> Any:
        if isinstance(value, Tensor):
            # Without negative values it may be a mask or an adjacency matrix.
            if value.is_floating_point() and bool((value < 0).any()):
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
    """The result of a copies test.

    Attributes:
        error: relative change of the outputs by merging the copies; infinite if shapes differ.
        effect: relative change of the outputs by making the copies; if it is tiny, nothing was tested.
    """

    error: float
    effect: float

    @property
    def vacuous(self) -> bool:
        """Whether making the copies hardly changed the outputs, so that nothing was tested."""
        return not self.effect > VACUOUS


@undisturbed()
def check_copies(
    model: nn.Module, example_inputs: ExampleInputs, *, width: Width = 0.5, seed: int = 0, tolerance: float = 1e-8
) -> Copies:
    """Check in float64 that copies of neurons merge without changing the outputs of a model.

    Args:
        model: as for `nac_gpu.plan`; not changed.
        example_inputs: as for `nac_gpu.plan`; only their shapes are used.
        width: as for `nac_gpu.plan`: how many neurons of each group stay distinct; the others become copies of them.
        seed: of the choice of copies.
        tolerance: largest allowed change of the outputs, relative to their largest value.

    Returns:
        The changes of the outputs by merging and by making the copies.

    Raises:
        AssertionError: the outputs changed by more than `tolerance`, or making the copies hardly changed them, so that
            nothing was tested (`randomise` helps if weights are zero).
        RuntimeError: the model does not run in float64.
        ValueError: as `nac_gpu.plan`.

    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> nac_gpu.testing.check_copies(model, torch.zeros(2, 8)).error < 1e-8
    True
    """
    request = Request(width=width, seed=seed)
    request.check()
    prepared = plan_for(take(model, example_inputs), request)
    found = merge_copies(prepared.model, example_inputs, prepared.choices, request.seed)
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
    """Make copies of random neurons in all groups, merge them, and compare the outputs, in float64.

    Args:
        model: the network without wrappers, as `nac_gpu.planning.prepare.plan_for` returns it; not changed.
        inputs: only their shapes are used.
        choices: groups, and how many neurons of each stay distinct.
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
    with in_one_type(torch.float64):
        try:
            before = floating_outputs(double, inputs)
        except Exception as error:  # the user's code may raise anything
            raise RuntimeError(
                f"the model does not run in float64, in which copies are compared: {type(error).__name__}: {error}; "
                'choose another implementation of this operation, such as "eager" in transformers'
            ) from error
        expected = floating_outputs(rebuild(double, copies), inputs)
        found = floating_outputs(rebuild(double, merger.finish(), attributes(double, choices)), inputs)
    return Copies(relative_error(found, expected), relative_error(before, expected))
