"""The size of a model: its parameters, and the floating point operations of one forward pass."""

from dataclasses import dataclass

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nac_gpu.network.ambient import undisturbed
from nac_gpu.network.running import ExampleInputs, call, evaluating, in_small_operations


class _NoTracker:
    """Replaces the module tracker of `FlopCounterMode`, which fails on views of parameters without gradients."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def flop_counter() -> FlopCounterMode:
    """A context that counts floating point operations in total, without a count for each module."""
    counter = FlopCounterMode(display=False)
    vars(counter)["mod_tracker"] = _NoTracker()
    return counter


@dataclass(frozen=True)
class Cost:
    """The size of a model, as `cost` returns it.

    Attributes:
        parameters: number of learnt values; tied ones count once.
        flops: floating point operations of one forward pass on the example inputs: those of matrix products and
            convolutions, 2 per multiply-add, as `torch.utils.flop_counter` counts them.
    """

    parameters: int
    flops: int


@undisturbed()
def cost(model: nn.Module, example_inputs: ExampleInputs) -> Cost:
    """Count a model's parameters, and the operations of its forward pass on these inputs in eval mode.

    Args:
        model: not changed.
        example_inputs: as for a call: a tensor, a sequence of arguments, or a mapping of keyword arguments.

    Returns:
        The number of parameters, and of floating point operations for the whole batch of inputs.

    >>> nac_gpu.cost(nn.Linear(3, 2), torch.ones(1, 3))
    Cost(parameters=8, flops=12)
    """
    counter = flop_counter()
    with evaluating(model), in_small_operations(model), counter:
        call(model, example_inputs)
    return Cost(sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops())
