"""Does merging a group leave a correct network? Tried on the example inputs, before anything is promised.

Some neurons of every group are made copies of others. Merging copies must not change the function at all; if it does,
or if the smaller network does not run (a size is written into the model's code), the group is left alone.
"""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nac_gpu.graph import ExampleInputs, call, evaluating, tensors_in
from nac_gpu.groups import Group
from nac_gpu.merge import Merger
from nac_gpu.rebuild import rebuild, tensors
from nac_gpu.sizes import attributes

TOLERANCE = 1e-8  # relative, float64


def copy_neurons(state: Mapping[str, Tensor], group: Group, labels: Tensor) -> dict[str, Tensor]:
    """Tensors in which all neurons of a cluster compute what its first neuron computes.

    Args:
        state: tensors by name; not changed.
        group: the group.
        labels: int64 [n].
    """
    first = torch.full((int(labels.max()) + 1,), group.size, dtype=torch.int64)
    first.scatter_reduce_(0, labels, torch.arange(group.size), "amin")
    home = first[labels]
    copies = dict(state)
    for member in group.members:
        if member.role == "mean":
            read = torch.arange(state[member.tensor].shape[member.dim])
            read[member.index.flatten()] = member.index[home].flatten()
            copies[member.tensor] = copies[member.tensor].index_select(
                member.dim, read.to(copies[member.tensor].device)
            )
    return copies


def random_labels(size: int, clusters: int, generator: torch.Generator) -> Tensor:
    """A random assignment of `size` neurons to exactly `clusters` clusters, int64 [size]."""
    labels = torch.cat([torch.arange(clusters), torch.randint(clusters, (size - clusters,), generator=generator)])
    return labels[torch.randperm(size, generator=generator)]


def outputs(model: nn.Module, example_inputs: ExampleInputs) -> list[Tensor]:
    """All tensors that the model returns in eval mode."""
    with evaluating(model):
        return list(tensors_in(call(model, example_inputs)))


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error over several tensors, each against its own largest value."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if b.numel() and b.is_floating_point():
            scale = float(b.abs().max()) or 1.0
            worst = max(worst, float((a - b).abs().max()) / scale)
    return worst


def in_float64(model: nn.Module, example_inputs: ExampleInputs) -> tuple[nn.Module, ExampleInputs]:
    """A copy of the model and its inputs in float64."""

    def double(value: object) -> object:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return copy.deepcopy(model).double(), pytree.tree_map(double, example_inputs)


def lively(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """The tensor, or random numbers of its shape where it holds one constant.

    Zero-initialised heads, layer scales of 1e-6 and inputs of zeros hide what merging does; none may make the trial
    vacuous.
    """
    if tensor.numel() < 2 or not tensor.is_floating_point() or not bool((tensor == tensor.flatten()[0]).all()):
        return tensor
    fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
    return drawn / fan_in**0.5


def failure(
    model: nn.Module, example_inputs: ExampleInputs, groups: Sequence[Group], widths: Sequence[int], seed: int = 0
) -> str | None:
    """Why these groups cannot be merged to these widths, or None if they can.

    Args:
        model: in float64; not changed.
        example_inputs: in float64; inputs and parameters that hold one constant are replaced by random ones.
        groups: to merge, all at once.
        widths: clusters of each.
        seed: of the choice of copies.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = {name for name, _ in model.named_parameters()}
    copies = {name: lively(t, generator) if name in parameters else t for name, t in tensors(model).items()}
    example_inputs = pytree.tree_map(lambda v: lively(v, generator) if isinstance(v, Tensor) else v, example_inputs)
    labels = [random_labels(group.size, width, generator) for group, width in zip(groups, widths, strict=True)]
    for group, chosen in zip(groups, labels, strict=True):
        copies = copy_neurons(copies, group, chosen)
    merger = Merger(copies)
    for group, chosen in zip(groups, labels, strict=True):
        merger.merge(group, chosen)
    expected = outputs(rebuild(model, copies), example_inputs)
    try:
        found = outputs(rebuild(model, merger.finish(), attributes(model, groups, widths)), example_inputs)
    except Exception as error:  # whatever the user's code raises when a width is not what it was written for
        return f"the smaller network does not run: {type(error).__name__}: {error}"
    error = relative_error(found, expected)
    if not error <= TOLERANCE:
        return f"merging identical neurons changed the outputs (relative error {error:.1e})"
    return None


def shrunk(state: Mapping[str, Tensor], groups: Sequence[Group], widths: Sequence[int]) -> dict[str, Tensor]:
    """Tensors of the sizes that a compression will give, whatever their values."""
    merger = Merger(dict(state))
    for group, width in zip(groups, widths, strict=True):
        merger.merge(group, torch.arange(group.size).clamp_max(width - 1))
    return merger.finish()
