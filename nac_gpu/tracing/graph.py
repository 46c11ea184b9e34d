"""The result of a recorded pass: groups of neurons that share one assignment, and neurons left alone with reasons."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor that is indexed by the neurons of a group.

    For example, a hidden layer of `nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))` has the members
    dimension 0 of `0.weight`, dimension 0 of `0.bias` (both `"mean"`) and dimension 1 of `2.weight` (`"sum"`).

    Attributes:
        tensor: name of the parameter or buffer.
        dim: the dimension.
        role: `"mean"` (merged neurons keep the mean) or `"sum"` (merged neurons are summed, Eq. (9)).
        index: int64 [n, m], the m positions along the dimension that belong to each of the n neurons. m is 1 in most
            cases; a channel that was flattened before a linear layer has a block of m columns.
    """

    tensor: str
    dim: int
    role: str
    index: Tensor


@dataclass(frozen=True)
class Producer:
    """A weight that makes the neurons of a group, with the tensors that are needed to compare and merge them.

    Attributes:
        member: the rows of the weight.
        layer: name of its module.
        bias: name of the bias added in the same operation, or None.
        norm: the BatchNorm directly after the layer, if nothing else reads the layer's output; else None.
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
    """Neurons that share one assignment, because their channels are the same wherever they are used.

    Attributes:
        name: name of the first layer that makes them.
        size: number n of neurons.
        members: every dimension of every tensor that is indexed by these neurons.
        producers: the weights that make them, in the order of the forward pass.
        norms: BatchNorms over them that do not belong to a single producer.
        units: modules that combine these neurons as whole units (attention heads, groups of channels); empty if the
            neurons are single channels.
        attributes: of integers that shrink with the group (numbers of heads, sizes stored by code): module, path of the
            attribute, and whether it surely is the group's (see `nac_gpu.merging.attributes.Following`).
        configured: whether its size may be written to a configuration of Hugging Face, from which code may compute
            something else, too.
        otherwise: groups of channels to compress instead if these units cannot be merged.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    producers: tuple[Producer, ...]
    norms: tuple[Norm, ...]
    units: tuple[str, ...] = ()
    attributes: tuple[tuple[str, str, bool], ...] = ()
    configured: bool = True
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
    """Neurons that are not compressed: the layer that makes them, their number, and the reason."""

    layer: str
    size: int
    reason: str

    @property
    def remedy(self) -> str | None:
        """A change of the model that would allow compression; None if their number is part of the model's function."""
        return next((remedy for part, remedy in _REMEDIES.items() if part in self.reason), None)


_POSITIONS = "channels that are used by their position keep their number: give each use a layer of its own"
_COMPUTED = "weights that forward computes are not seen: compute them with torch.nn.utils.parametrize"
_REMEDIES = {
    "does not run:": "a size is written into the code: take it from a tensor's shape in forward",
    "not known": "the operation has no rule: write it with elementwise operations, products, views and reductions",
    "changed the outputs": _POSITIONS,
    "meet values that differ": "constants with one value for each channel merge with them if they are buffers: use "
    "register_buffer",
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
    """The result of a recorded pass.

    Attributes:
        groups: in the order of the pass.
        left_alone: neurons that are in no group.
        auxiliary: the pass includes layers that only run in training.
        flops: floating point operations of the pass, as `nac_gpu.cost` counts them.
        operations: floating point operations by the name of the parameter that they multiply with.
        norms: by the name of a weight, the BatchNorm directly after it, if nothing else reads the weight's output.
        written: names of the parameters that the pass writes to.
        values: the pass had to compute all values, not only shapes.
    """

    groups: tuple[Group, ...]
    left_alone: tuple[LeftAlone, ...]
    auxiliary: bool = False
    flops: int = 0
    operations: Mapping[str, int] = field(default_factory=dict)
    norms: Mapping[str, Norm] = field(default_factory=dict)
    written: tuple[str, ...] = ()
    values: bool = False
