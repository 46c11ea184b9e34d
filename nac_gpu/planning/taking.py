"""Taking a user's model: wrappers are removed, weights are checked, and a forward pass is recorded."""

from torch import nn

from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.distributed.replicas import same_model
from nac_gpu.distributed.sharded import unsharded
from nac_gpu.network.checking import check_weights
from nac_gpu.network.costs import Cost
from nac_gpu.network.running import ExampleInputs
from nac_gpu.network.unwrapping import computed, unwrapped
from nac_gpu.planning.subject import Network, Subject
from nac_gpu.tracing.trace import record


def take(model: nn.Module, example_inputs: ExampleInputs, ranks: Ranks = ALONE) -> Network:
    """The network without wrappers, checked; the user's model is not changed.

    Raises:
        ValueError: weights are not finite, or the model differs from that of rank 0.
        TypeError: integer or complex weights.
    """
    inputs = ranks.sent(example_inputs)
    network, wrappers = unwrapped(model)
    network, sharded = unsharded(network, ranks)
    network, buffers = same_model(network, model, ranks)
    network, weights = computed(network)
    check_weights(network)
    return Network(network, inputs, (*wrappers, *sharded, *buffers, *weights), ranks)


def recorded(network: Network) -> Subject:
    """The network with its record.

    Raises:
        RuntimeError: the forward pass fails on the example inputs.
    """
    graph = record(network.model, network.inputs)
    cost = Cost(sum(parameter.numel() for parameter in network.model.parameters()), graph.flops)
    return Subject(**vars(network), graph=graph, cost=cost)
