"""What a model costs: parameters, and the operations of one forward pass."""

from dataclasses import dataclass

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nac_gpu.network.running import ExampleInputs, call, evaluating, in_small_operations


class _NoTracker:
    """In the place of what counts for each module: it fails on views of parameters without gradients."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def flop_counter() -> FlopCounterMode:
    """A context in which floating point operations are counted, of the whole model only."""
    counter = FlopCounterMode(display=False)
    vars(counter)["mod_tracker"] = _NoTracker()
    return counter


@dataclass(frozen=True)
class Cost:
    """Size of a model.

    Attributes:
        parameters: how many numbers are learnt (tied ones once).
        flops: floating point operations of one forward pass on the example inputs, 2 per multiply-add, of matrix
            products and convolutions, as `torch.utils.flop_counter` counts them.
    """

    parameters: int
    flops: int


def cost(model: nn.Module, example_inputs: ExampleInputs) -> Cost:
    """Count a model's parameters and the operations of its forward pass on these inputs, in eval mode."""
    counter = flop_counter()
    with evaluating(model), in_small_operations(model), counter:
        call(model, example_inputs)
    return Cost(sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops())
