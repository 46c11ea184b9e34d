"""The network that is to become smaller, and what is known of it."""

from dataclasses import dataclass

from torch import nn

from nac_gpu.distributed.ranks import Ranks
from nac_gpu.network.costs import Cost
from nac_gpu.network.running import ExampleInputs
from nac_gpu.tracing.graph import Graph


@dataclass(frozen=True)
class Network:
    """A user's model without what training has put around it.

    Attributes:
        model: the network itself (see `nac_gpu.network.unwrapping`), with weights that are floating and finite.
        inputs: what it is called with, those of rank 0.
        changes: what was taken off, for people.
        ranks: the processes that work together.
    """

    model: nn.Module
    inputs: ExampleInputs
    changes: tuple[str, ...]
    ranks: Ranks

    @property
    def on_cuda(self) -> bool:
        """Whether some of it is on a GPU."""
        return any(parameter.is_cuda for parameter in self.model.parameters())


@dataclass(frozen=True)
class Subject(Network):
    """A network with what one recorded pass tells of it.

    Attributes:
        graph: the record.
        cost: of the network.
    """

    graph: Graph
    cost: Cost
