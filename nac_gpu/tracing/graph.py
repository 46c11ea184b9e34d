"""What a recorded pass tells: groups of neurons that share one assignment, and what is left alone and why."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor that a group runs through.

    Attributes:
        tensor: name of the parameter or buffer.
        dim: the dimension.
        role: `"mean"` (merged neurons keep the mean) or `"sum"` (Eq. (9): they add up).
        index: int64 [n, m], the positions along the dimension that belong to each of the n neurons (m is 1, but for
            example a block of columns where a channel was flattened).
    """

    tensor: str
    dim: int
    role: str
    index: Tensor


@dataclass(frozen=True)
class Producer:
    """A weight that makes the neurons of a group, with what is needed to compare and merge them.

    Attributes:
        member: its rows.
        layer: name of its module.
        bias: name of the bias added in the same operation, or None.
        norm: the BatchNorm that takes its bare result and nothing else does, or None.
    """

    member: Member
    layer: str
    bias: str | None
    norm: "Norm | None"


@dataclass(frozen=True)
class Norm:
    """A BatchNorm over the channels of a group: names of its tensors (None where it has none) and its epsilon."""

    weight: str | None
    bias: str | None
    mean: str | None
    variance: str | None
    eps: float


@dataclass(frozen=True)
class Group:
    """Neurons that one assignment must serve together.

    Attributes:
        name: name of the layer that first makes them.
        size: number n of neurons.
        members: every dimension of every tensor that they run through.
        producers: the members that make them, in the order of the forward pass.
        norms: BatchNorms over them that stand behind no single producer.
        units: modules in which these neurons are whole units, heads of attention or groups of channels; none if they
            are channels.
        attributes: (module, attribute) of whole numbers that shrink as the group does: heads, sizes kept by code.
        otherwise: groups of channels to be compressed if these units cannot be.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    producers: tuple[Producer, ...]
    norms: tuple[Norm, ...]
    units: tuple[str, ...] = ()
    attributes: tuple[tuple[str, str], ...] = ()
    otherwise: tuple["Group", ...] = field(default=(), compare=False)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that make the neurons."""
        return tuple(dict.fromkeys(producer.layer for producer in self.producers))


@dataclass(frozen=True)
class Choice:
    """A group, and how many of its neurons are kept."""

    group: Group
    width: int

    @property
    def merges(self) -> bool:
        """Whether any neurons are merged."""
        return self.width < self.group.size


@dataclass(frozen=True)
class LeftAlone:
    """Neurons that are not compressed: the layer that makes them, how many, and why."""

    layer: str
    size: int
    reason: str

    @property
    def remedy(self) -> str | None:
        """What would let them be compressed; None where nothing would, because their number is part of the function."""
        return next((remedy for part, remedy in _REMEDIES.items() if part in self.reason), None)


_POSITIONS = "channels that are used by their position keep their number: give each use a layer of its own"
_COMPUTED = "weights that forward computes are not seen: compute them with torch.nn.utils.parametrize"
_REMEDIES = {
    "does not run:": "a size is written into the code: take it from a tensor's shape in forward",
    "not known": "the operation has no rule: write it with elementwise operations, products, views and reductions",
    "changed the outputs": _POSITIONS,
    "picked by index": _POSITIONS,
    "moved by a fixed number": _POSITIONS,
    "both makes and reads": "one weight is used in two ways: give each use a parameter of its own",
    "written in place": "write into a new tensor (torch.cat, torch.where) instead of into a part of another one",
    "on these example inputs": "give example inputs with which these layers run",
    "are flattened into one": "multiply with a matrix, and give its result more dimensions; " + _COMPUTED,
    "kernel is not a parameter": _COMPUTED,
    "bias is not a parameter": _COMPUTED,
    "parameters are computed": _COMPUTED,
}


@dataclass(frozen=True)
class Graph:
    """What a recorded pass tells.

    Attributes:
        groups: in the order of the pass.
        left_alone: what is in no group.
        auxiliary: layers were seen that run in training only.
        flops: of the pass, as `nac_gpu.cost` counts them.
        operations: of the pass, by the name of the parameter that they multiply with.
        norms: by the name of a weight, the BatchNorm that takes its bare result and nothing else does.
    """

    groups: tuple[Group, ...]
    left_alone: tuple[LeftAlone, ...]
    auxiliary: bool = False
    flops: int = 0
    operations: Mapping[str, int] = field(default_factory=dict)
    norms: Mapping[str, Norm] = field(default_factory=dict)
