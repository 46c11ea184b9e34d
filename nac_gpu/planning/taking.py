"""Taking a user's model: wrappers are removed, weights are checked, and a forward pass is recorded.

Some example inputs are too small to show what a model does. A sequence of one step does not show that a layer reads
its own output, and a batch of one hides which dimension is the batch. So where an example has a dimension of size 1,
and the model also runs with size 2, a second pass is recorded.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.distributed.replicas import same_model
from nac_gpu.distributed.sharded import unsharded
from nac_gpu.network.ambient import ordinary
from nac_gpu.network.checking import check_model, check_weights, reason_inside, unrecorded
from nac_gpu.network.copying import ordinary_model
from nac_gpu.network.costs import Cost
from nac_gpu.network.running import ExampleInputs, describe
from nac_gpu.network.unwrapping import computed, unwrapped
from nac_gpu.planning.subject import Network, Subject
from nac_gpu.tracing.graph import Graph, Group, LeftAlone
from nac_gpu.tracing.trace import record, runs


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
    cost = Cost(sum(parameter.numel() for parameter in network.model.parameters()), graph.flops)
    more = _enlarged(network.model, network.inputs, graph)
    larger = None
    if more is not None:
        larger, found, line = more
        graph = replace(found, flops=graph.flops, operations=graph.operations)
        network = replace(network, changes=(*network.changes, line))
    alone = [
        replace(alone, reason=reason_inside(network.model, alone.layer) or alone.reason) for alone in graph.left_alone
    ]
    alone += [LeftAlone(*found) for found in unrecorded(network.model)]
    return Subject(**vars(network), graph=replace(graph, left_alone=tuple(alone)), cost=cost, larger=larger)


def _enlarged(model: nn.Module, inputs: ExampleInputs, graph: Graph) -> tuple[ExampleInputs, Graph, str] | None:
    """Larger inputs with which the model does something else with its channels than with the given ones.

    Args:
        model: not changed.
        inputs: the example inputs.
        graph: the record of a pass with them.

    Returns:
        The larger inputs, the record of a pass with them, and a line for the printed plan; None if there are none.
    """
    sizes = [leaf.shape for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    dims = sorted({dim for shape in sizes for dim, size in enumerate(shape) if size == 1})
    larger = inputs
    for dim in dims:
        wider = pytree.tree_map_only(Tensor, lambda leaf, dim=dim: _doubled(leaf, dim), larger)
        if len(dims) == 1 or runs(model, wider):  # not with images of two channels in place of one
            larger = wider
    if larger is inputs:
        return None
    try:
        found = record(model, larger, values=graph.values)
    except RuntimeError:  # it depends on values which of them fit
        return None
    if _same(found.groups, graph.groups):
        return None
    line = f"tried with larger inputs, too, because a size of 1 can hide something: {describe(larger)}"
    return larger, found, line


def _doubled(tensor: Tensor, dim: int) -> Tensor:
    return torch.cat([tensor, tensor], dim) if tensor.ndim > dim and tensor.shape[dim] == 1 else tensor


def _same(left: tuple[Group, ...], right: tuple[Group, ...]) -> bool:
    """Whether two records found the same groups."""

    def alike(a: Group, b: Group) -> bool:
        if (a.name, a.size, len(a.members)) != (b.name, b.size, len(b.members)):
            return False
        pairs = zip(a.members, b.members, strict=True)
        return all(
            (m.tensor, m.dim, m.role) == (n.tensor, n.dim, n.role) and torch.equal(m.index, n.index) for m, n in pairs
        )

    return len(left) == len(right) and all(map(alike, left, right))
