"""The network to be compressed, with its record and cost."""

from dataclasses import dataclass

from torch import nn

from nac_gpu.distributed.ranks import Ranks
from nac_gpu.network.costs import Cost
from nac_gpu.network.running import ExampleInputs
from nac_gpu.tracing.graph import Graph


@dataclass(frozen=True)
class Network:
    """A user's model without wrappers and parametrisations.

    Attributes:
        model: the network itself (see `nac_gpu.network.unwrapping`); its weights are floating and finite.
        inputs: example inputs of rank 0.
        changes: what was removed, for the printed plan.
        ranks: the processes that work together.
    """

    model: nn.Module
    inputs: ExampleInputs
    changes: tuple[str, ...]
    ranks: Ranks

    @property
    def on_cuda(self) -> bool:
        """Whether any parameter is on a GPU."""
        return any(parameter.is_cuda for parameter in self.model.parameters())


@dataclass(frozen=True)
class Subject(Network):
    """A network with the record of one forward pass.

    Attributes:
        graph: the record.
        cost: of the network.
        larger: inputs on which it does something else with its channels, so that it is tried on them, too.
    """

    graph: Graph
    cost: Cost
    larger: ExampleInputs | None = None
