"""Is a compression right, whatever the model? What the zoo and the tests of architectures ask of every network.

The library tries each plan itself before it promises anything; these checks are independent of its trial: other copies,
other input values, and outputs that are found in containers of any kind.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nac_gpu.forward import ExampleInputs, call, evaluating
from nac_gpu.groups import Group
from nac_gpu.merge import Merger
from nac_gpu.rebuild import rebuild, tensors
from nac_gpu.sizes import attributes
from nac_gpu.trial import converted, copy_neurons, random_labels

VACUOUS = 1e-6  # copies of neurons that change the outputs by less than this test nothing


def leaves(value: object) -> list[Tensor]:
    """All tensors in a value: in sequences, mappings, dataclasses, in their order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, list | tuple | set):
        return [leaf for item in value for leaf in leaves(item)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [leaf for field in dataclasses.fields(value) for leaf in leaves(getattr(value, field.name))]
    return []


def outputs(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    """All floating tensors that the model returns in eval mode.

    Raises:
        ValueError: there is none, so that nothing could be compared.
    """
    with evaluating(model):
        found = [tensor for tensor in leaves(call(model, inputs)) if tensor.is_floating_point()]
    if not found:
        raise ValueError(f"{type(model).__name__} returned no floating tensor, expected outputs to compare")
    return found


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest deviation of several tensors, each relative to its own largest value; NaN counts as infinite."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if b.numel():
            same = (a == b) | (a.isnan() & b.isnan())  # infinities too
            error = float((a - b).masked_fill(same, 0).abs().max()) / (float(b.nan_to_num(0, 0, 0).abs().max()) or 1.0)
            worst = max(worst, error if error == error else float("inf"))
    return worst


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """As after some training: no BatchNorm statistics of a fresh model, and no parameter that holds one constant.

    Constants of zero (biases, heads, layer scales) become numbers around zero, all others numbers around themselves.

    Args:
        model: changed in place, and given back.
        seed: of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() < 2 or not parameter.is_floating_point():
                continue
            first = float(parameter.flatten()[0])
            if bool((parameter == first).all()):
                parameter.copy_(normal(parameter) * 0.3 + (0.0 if abs(first) < 1e-3 else first))
        for module in model.modules():
            for name in ("running_mean", "running_var"):
                statistic = getattr(module, name, None)
                if isinstance(statistic, Tensor):
                    drawn = normal(statistic)
                    statistic.copy_(drawn * 0.3 if name == "running_mean" else 0.75 + 0.25 * drawn.tanh())
    return model


def other_values(inputs: Any, seed: int) -> Any:
    """Inputs of the same shapes with other values: floating tensors drawn anew, all else as it was."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.is_floating_point() and bool((value < 0).any()):  # else a mask, an adjacency matrix, a share
                return torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
            return value
        if isinstance(value, Mapping):
            return {key: drawn(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(drawn(item) for item in value)
        return value

    return drawn(inputs)


@dataclass(frozen=True)
class Identity:
    """What merging copies did.

    Attributes:
        error: how far the outputs are from those before the merge, relative; infinite if shapes differ.
        effect: how far making the copies had moved the outputs, relative: little means that nothing was tested.
    """

    error: float
    effect: float

    @property
    def vacuous(self) -> bool:
        """Whether the copies changed next to nothing."""
        return not self.effect > VACUOUS


def identity(
    model: nn.Module, inputs: ExampleInputs, groups: Sequence[Group], widths: Sequence[int], seed: int = 1
) -> Identity:
    """Make copies of random neurons in every group at once, merge them, and compare, in float64.

    Args:
        model: the network itself, as `nac_gpu.plan.prepare` gives it; not changed.
        inputs: their shapes matter; other values are used.
        groups: to merge.
        widths: how many neurons of each stay different.
        seed: of the choice of copies.
    """
    double, inputs = converted(model, other_values(inputs, seed), torch.float64)
    generator = torch.Generator().manual_seed(seed)
    labels = [random_labels(group.size, width, generator) for group, width in zip(groups, widths, strict=True)]
    copies = tensors(double)
    for group, chosen in zip(groups, labels, strict=True):
        copies = copy_neurons(copies, group, chosen)
    merger = Merger(copies)
    for group, chosen in zip(groups, labels, strict=True):
        merger.merge(group, chosen)
    before = outputs(double, inputs)
    expected = outputs(rebuild(double, copies), inputs)
    found = outputs(rebuild(double, merger.finish(), attributes(double, groups, widths)), inputs)
    return Identity(difference(found, expected), difference(before, expected))


def compressible_share(model: nn.Module, groups: Iterable[Group]) -> float:
    """The share of the parameters' elements that lie at positions of some group, along any dimension."""
    parameters = dict(model.named_parameters())
    untouched = {name: torch.ones((1,) * p.ndim, dtype=torch.bool) for name, p in parameters.items()}
    for group in groups:
        for member in group.members:
            if member.tensor in parameters:
                shape = [1] * parameters[member.tensor].ndim
                shape[member.dim] = parameters[member.tensor].shape[member.dim]
                kept = torch.ones(shape[member.dim], dtype=torch.bool)
                kept[member.index.flatten().cpu()] = False
                untouched[member.tensor] = untouched[member.tensor] & kept.reshape(shape)
    total = sum(p.numel() for p in parameters.values())
    left = sum(int(mask.expand(parameters[name].shape).sum()) for name, mask in untouched.items())
    return (total - left) / total if total else 0.0


def training_step(model: nn.Module, inputs: ExampleInputs) -> None:
    """Forward in eval mode, then a step of training on the squares of the outputs; raises what the model raises."""
    outputs(model, inputs)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4)
    loss = torch.stack([t.square().sum() for t in leaves(call(model, inputs)) if t.requires_grad]).sum()
    loss.backward()
    optimizer.step()
    model.eval()
