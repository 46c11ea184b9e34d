"""Taking a user's model: wrappers are removed, weights are checked, and a forward pass is recorded."""

from dataclasses import replace

from torch import nn

from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.distributed.replicas import same_model
from nac_gpu.distributed.sharded import unsharded
from nac_gpu.network.ambient import ordinary, ordinary_model
from nac_gpu.network.checking import check_model, check_weights, reason_inside, unrecorded
from nac_gpu.network.costs import Cost
from nac_gpu.network.running import ExampleInputs
from nac_gpu.network.unwrapping import computed, unwrapped
from nac_gpu.planning.subject import Network, Subject
from nac_gpu.tracing.graph import LeftAlone
from nac_gpu.tracing.trace import record


def take(model: nn.Module, example_inputs: ExampleInputs, ranks: Ranks = ALONE) -> Network:
    """The network without wrappers, checked; the user's model is not changed.

    Raises:
        ValueError: weights are not finite, or the model differs from that of rank 0.
        TypeError: integer or complex weights, or a model of a kind that cannot be compressed.
    """
    network, wrappers = unwrapped(model)
    check_model(network)
    inputs = ordinary(ranks.sent(example_inputs))
    network = ordinary_model(network)
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
    alone = [
        replace(alone, reason=reason_inside(network.model, alone.layer) or alone.reason) for alone in graph.left_alone
    ]
    alone += [LeftAlone(*found) for found in unrecorded(network.model)]
    graph = replace(graph, left_alone=tuple(alone))
    cost = Cost(sum(parameter.numel() for parameter in network.model.parameters()), graph.flops)
    return Subject(**vars(network), graph=graph, cost=cost)
