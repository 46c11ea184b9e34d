"""What the neurons of a group do: their activations where other layers read them, as second moments.

Layers that read are linear layers and convolutions without groups, whose columns the moments can be turned into; other
readers (recurrent layers, raw parameters in products) are not looked at.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nac_gpu.distributed import ALONE, Ranks
from nac_gpu.forward import ExampleInputs, call, evaluating, sent
from nac_gpu.groups import Group, Member

Batches = Sequence[ExampleInputs]


@dataclass(frozen=True)
class Reading:
    """A layer that reads a group's neurons.

    Attributes:
        layer: name of the module.
        member: the columns of its weight.
    """

    layer: str
    member: Member


def readings(model: nn.Module, group: Group) -> tuple[Reading, ...]:
    """The layers that read a group and can be looked at."""
    modules = dict(model.named_modules())
    found = []
    for member in group.members:
        layer = member.tensor.removesuffix(".weight")
        module = modules.get(layer)
        if member.role == "sum" and layer != member.tensor and module is not None and member.dim == _columns(module):
            found.append(Reading(layer, member))
    return tuple(found)


def _columns(module: nn.Module) -> int | None:
    """The dimension of its weight that a plain linear layer or convolution reads with; None for any other module."""
    plain = type(module).forward in (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    if plain and getattr(module, "groups", 1) == 1:
        return 1
    return 0 if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else None  # Hugging Face's


def by_channel(module: nn.Module, inputs: Tensor) -> Tensor:
    """A layer's input with its channels last: [..., channels]."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return inputs.movedim(-1 - len(module.kernel_size), -1)
    return inputs


def samples(module: nn.Module, inputs: Tensor, index: Tensor) -> Tensor:
    """A layer's input as activations of neurons: [samples, n].

    Args:
        module: the layer.
        inputs: what it was called with.
        index: int64 [n, m], where each neuron's channels are; each of the m gives samples of its own.
    """
    channels = by_channel(module, inputs).flatten(0, -2)
    return channels[:, sent(index, inputs.device)].transpose(1, 2).flatten(0, 1)


class Moments:
    """Means and covariance of samples `a` and `b`, summed up in float64 around the mean of the first ones.

    Each batch has its own, which are taken in one after another: wherever they were summed up, the bits are the same.
    """

    def __init__(self) -> None:
        self.count = 0
        self._product: Tensor | float = 0.0
        self._sums: list[Tensor] = []
        self._centres: list[Tensor] = []

    def add(self, a: Tensor, b: Tensor) -> None:
        """Take in samples: [samples, p] and [samples, q]."""
        if not len(a):
            return
        if not self._centres:
            self._centres = [a.mean(0), b.mean(0)]
            self._sums = [torch.zeros_like(centre, dtype=torch.float64) for centre in self._centres]
        a, b = a - self._centres[0], b - self._centres[1]
        self.count += len(a)
        self._product = self._product + (a.T @ b).double()
        self._sums = [total + part.sum(0, dtype=torch.float64) for total, part in zip(self._sums, (a, b), strict=True)]

    def take(self, other: "Moments") -> None:
        """Take in what another one has summed up; its memory is used again."""
        if not self.count or not other.count:
            if other.count:
                vars(self).update(vars(other))
            return
        a, b = (new.double() - old.double() for new, old in zip(other._centres, self._centres, strict=True))
        assert isinstance(other._product, Tensor), "it has samples"
        moved = other._product.addr_(other._sums[0], b).addr_(a, other._sums[1] + other.count * b)
        self._product = moved.add_(self._product)
        self._sums = [
            total + part + other.count * shift
            for total, part, shift in zip(self._sums, other._sums, (a, b), strict=True)
        ]
        self.count += other.count

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """The mean of a [p] and of b [q]."""
        a, b = (centre + total / self.count for centre, total in zip(self._centres, self._sums, strict=True))
        return a, b

    @property
    def covariance(self) -> Tensor:
        """The covariance of a and b, float64 [p, q]."""
        return self._product / self.count - torch.outer(self._sums[0], self._sums[1]) / self.count**2

    @property
    def second(self) -> Tensor:
        """The mean product of a and b, float64 [p, q]."""
        return self.covariance + torch.outer(*self.means)


def floating(tensor: Tensor) -> Tensor:
    """The tensor in the type in which products are taken: float64 stays, everything else is float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _EnoughError(Exception):
    """All that was looked for has been seen: the rest of the pass is not needed."""


def look(model: nn.Module, batch: ExampleInputs, calls: Mapping[str, int], take: Callable[[str, Tensor], None]) -> None:
    """Show what layers are called with in a forward pass, up to the last of these calls.

    Args:
        model: in eval mode, without gradients (see `evaluating`).
        batch: its inputs.
        calls: names of the layers, and how many times each is called.
        take: is given a layer's name and its input, which may change once it returns.
    """
    modules = dict(model.named_modules())
    missing = sum(calls.values())

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            nonlocal missing
            take(name, inputs[0] if inputs else next(iter(keywords.values())))
            missing -= 1
            if not missing:
                raise _EnoughError

        return modules[name].register_forward_pre_hook(hook, with_kwargs=True)

    hooks = [watch(name) for name in calls]
    try:
        call(model, batch)
    except _EnoughError:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def captured(model: nn.Module, batch: ExampleInputs, calls: Mapping[str, int]) -> dict[str, list[Tensor]]:
    """Copies of what layers are called with: see `look`."""
    seen: dict[str, list[Tensor]] = {name: [] for name in calls}
    look(model, batch, calls, lambda name, value: seen[name].append(value.clone()))
    return seen


def count_calls(model: nn.Module, batch: ExampleInputs, layers: Iterable[str]) -> dict[str, int]:
    """How many times each of these layers is called in a forward pass; those that are not called are left out."""
    counts = dict.fromkeys(layers, 0)

    def take(name: str, _: Tensor) -> None:
        counts[name] += 1

    look(model, batch, dict.fromkeys(counts, 1 << 30), take)
    return {name: count for name, count in counts.items() if count}


def as_batches(calibration: Iterable[Any], example_inputs: ExampleInputs, device: torch.device) -> Iterator[Any]:
    """Calibration data as what the model is called with.

    Where the example input is one tensor, a batch may be a pair such as `(images, labels)`: its first tensor is taken.

    Raises:
        TypeError: the calibration data cannot be gone through, or a batch is of another kind than the example inputs.
        ValueError: there is no batch in it.
    """
    if isinstance(calibration, Tensor) or not isinstance(calibration, Iterable):
        kind = "a tensor" if isinstance(calibration, Tensor) else type(calibration).__name__
        raise TypeError(f"calibration is {kind}, expected batches: a list of inputs of the model, or a DataLoader")
    none = True
    for number, given in enumerate(calibration):
        batch = given
        if isinstance(example_inputs, Tensor) and isinstance(batch, list | tuple) and batch:
            batch = batch[0]
        if isinstance(example_inputs, Tensor) and not isinstance(batch, Tensor):
            raise TypeError(
                f"batch {number} of the calibration data is {type(batch).__name__}, expected a tensor as in the "
                "example inputs, or a pair that starts with one"
            )
        none = False
        yield pytree.tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, batch)
    if none:
        raise ValueError("the calibration data has no batch, expected at least one; a generator can be used only once")


@dataclass(frozen=True)
class Activity:
    """How the neurons of a group are read, a pair of matrices for each reading.

    Attributes:
        covariances: of the neurons' activations, float64 [n, n] each.
        gains: inner products of the neurons' outgoing weights, float64 [n, n] each.
    """

    covariances: tuple[Tensor, ...]
    gains: tuple[Tensor, ...]

    def energies(self) -> Tensor:
        """What each neuron's activations contribute to the variance of what its readers make, float64 [n]."""
        total = torch.zeros_like(self.gains[0][0])
        for covariance, gain in zip(self.covariances, self.gains, strict=True):
            own = covariance.diagonal() * gain.diagonal()
            total = total + own / own.sum().clamp_min(torch.finfo(own.dtype).tiny)
        return total

    def masses(self) -> Tensor:
        """What each neuron counts in a cluster, float64 [n]: what it contributes to its readers' variance, above 0."""
        energies = self.energies()
        return torch.maximum(energies, (1e-6 * energies.max()).clamp_min(torch.finfo(energies.dtype).tiny))

    def points(self) -> tuple[Tensor, Tensor]:
        """Neurons as points for clustering, and their masses: float64 [n, n] and [n].

        Activations are compared by their correlation, so that neurons that differ in scale only are the same.
        """
        energies = self.energies()
        similar = torch.zeros_like(self.gains[0])
        tiny = torch.finfo(similar.dtype).tiny
        for covariance, gain in zip(self.covariances, self.gains, strict=True):
            own = covariance.diagonal() * gain.diagonal()
            scale = (own / own.sum().clamp_min(tiny) / energies.clamp_min(tiny)).clamp_min(0).sqrt()
            deviation = covariance.diagonal().clamp_min(0).sqrt()
            alive = deviation > 1e-6 * deviation.max()
            scale = torch.where(alive, scale / torch.where(alive, deviation, 1), 0)
            similar += covariance * torch.outer(scale, scale)
        return _root(similar), self.masses()


# Of the mean of a Gram matrix's diagonal: what rounding may take from it, and more where that is not enough.
_TRIFLES = (1e-14, 1e-12, 1e-10)


def _root(gram: Tensor) -> Tensor:
    """Points with these inner products: [n, n].

    A Cholesky factor, which takes far fewer operations than eigenvectors. Where the matrix has not full rank, a trifle
    on its diagonal moves all points apart alike.
    """
    unit = gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for trifle in _TRIFLES:
        factor, failed = torch.linalg.cholesky_ex(gram + trifle * unit)
        if not bool(failed):
            return factor
    values, vectors = torch.linalg.eigh(gram)  # nothing but zeros, or rounded by more than that
    return vectors * values.clamp_min(0).sqrt()


def outgoing(weight: Tensor, member: Member) -> Tensor:
    """The columns of a weight that read each neuron: [n, m, ...]."""
    return weight.movedim(member.dim, 0)[sent(member.index, weight.device)]


def observe(
    model: nn.Module,
    state: Mapping[str, Tensor],
    groups: Sequence[Group],
    batches: Batches,
    ranks: Ranks = ALONE,
) -> dict[str, Activity]:
    """Run the model on batches, and see how the neurons of each group are read: by the name of the group.

    Args:
        model: the original.
        state: its tensors by name.
        groups: groups; those that nothing reads that can be looked at are left out.
        batches: inputs.
        ranks: the processes that divide the batches among them.

    Raises:
        ValueError: activations that are not finite.
        RankError: another rank failed, or was lost.
    """
    read = {group.name: readings(model, group) for group in groups}
    layers = list(dict.fromkeys(reading.layer for found in read.values() for reading in found))
    if not layers:
        return {}
    modules = dict(model.named_modules())
    keys = [(name, reading.layer) for name, found in read.items() for reading in found]
    moments = {key: Moments() for key in keys}

    def looked(batch: ExampleInputs) -> dict[tuple[str, str], Moments]:
        own = {key: Moments() for key in keys}

        def take(layer: str, inputs: Tensor) -> None:
            for name, found in read.items():
                for reading in found:
                    if reading.layer == layer:
                        values = floating(samples(modules[layer], inputs, reading.member.index))
                        own[name, layer].add(values, values)

        look(model, batch, calls, take)
        return own

    with evaluating(model):
        calls = count_calls(model, batches[0], layers)
        for own in ranks.share(batches, looked):
            for key, one in own.items():
                moments[key].take(one)
    result = {}
    for name, found in read.items():
        called = [reading for reading in found if moments[name, reading.layer].count]
        covariances = tuple(moments[name, reading.layer].covariance for reading in called)
        for reading, covariance in zip(called, covariances, strict=True):
            if not bool(torch.isfinite(covariance).all()):
                raise ValueError(
                    f"{reading.layer} reads activations that are not finite on the calibration data, expected finite "
                    "ones; check the inputs"
                )
        flat = [outgoing(state[reading.member.tensor], reading.member).flatten(1).double() for reading in called]
        if called:
            result[name] = Activity(covariances, tuple(columns @ columns.T for columns in flat))
    return result
