"""The size of a model, counted: its parameters, and the floating point operations of one forward pass."""

from torch import nn

from nac_gpu.network.ambient import undisturbed
from nac_gpu.network.copying import copied
from nac_gpu.network.costs import Cost, flop_counter
from nac_gpu.network.running import ExampleInputs, call, evaluating, in_small_operations


@undisturbed()
def cost(model: nn.Module, example_inputs: ExampleInputs) -> Cost:
    """Count a model's parameters, and the operations of its forward pass on these inputs in eval mode.

    Args:
        model: not changed, and not run: a copy is.
        example_inputs: as for a call: a tensor, a sequence of arguments, or a mapping of keyword arguments.

    Returns:
        The number of parameters, and of floating point operations for the whole batch of inputs.

    >>> nac_gpu.cost(nn.Linear(3, 2), torch.ones(1, 3))
    Cost(parameters=8, flops=12)
    """
    counter, run = flop_counter(), copied(model)
    with evaluating(run), in_small_operations(run), counter:
        call(run, example_inputs)
    return Cost(sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops())
