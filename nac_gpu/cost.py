"""What a model costs: parameters, and the operations of one forward pass."""

from dataclasses import dataclass

from torch import nn

from nac_gpu.forward import ExampleInputs, call, evaluating, flop_counter, in_small_operations


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
