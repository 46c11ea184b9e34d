"""Compensation: what merging lost, made up for in the layers that read.

The layers that read a merged group are changed so that they make of the merged neurons what they made of the original
ones. Two ridge regressions on the activations that the original and the merged network have on the same inputs, each
shrunk towards the one before:

- of every original neuron on all merged ones, shrunk towards the sum of Eq. (9); folded into the columns;
- for layers that read several values a neuron (the positions of a kernel, the channels of a head), of what is still
  missing in their outputs on these values.

What they make is linear in what they read, so constants go to their bias, or the mean of the BatchNorm behind. Groups
are compensated in the order of the pass, on the inputs that the merged network itself has: later layers make up for
what earlier ones left.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nac_gpu.calibration.activity import Activity
from nac_gpu.calibration.batches import Batches
from nac_gpu.calibration.moments import RIDGE_NEURONS, Moments, ridge
from nac_gpu.calibration.readings import Reading, by_channel, outgoing, readings, samples
from nac_gpu.clustering.labels import first_of_each
from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.merging.centroids import Merger, keeps_all
from nac_gpu.network.copying import rebuild
from nac_gpu.network.moving import sent
from nac_gpu.network.precision import floating
from nac_gpu.network.running import ExampleInputs, evaluating
from nac_gpu.network.state import tensors
from nac_gpu.network.watching import captured, count_calls, look
from nac_gpu.tracing.graph import Graph, Group

_RIDGE_VALUES = 5e-2
_MOST_ROWS = 32768  # positions looked at in the second regression, all batches together


@dataclass(frozen=True)
class Assigned:
    """A group's clusters.

    Attributes:
        group: the group.
        labels: int64 [n], as `Merger.merge` takes them.
    """

    group: Group
    labels: Tensor

    @property
    def first(self) -> Tensor:
        """The first neuron of each cluster, where the cluster lives: int64 [k]."""
        return first_of_each(self.labels)

    @property
    def summing(self) -> Tensor:
        """The matrix of Eq. (9): float64 [n, k], one where a neuron is in a cluster."""
        clusters = torch.arange(int(self.labels.max()) + 1)
        return (self.labels[:, None] == clusters).double()


class Compensator:
    """Merges groups one after another, and changes the layers that read them.

    Attributes:
        merger: what it merges with.

    Args:
        model: the original; not changed.
        graph: its record.
        batches: inputs of the model.
        activities: how the neurons of groups are read on these inputs, by the name of the group.
        ranks: the processes that divide the batches among them.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        batches: Batches,
        activities: Mapping[str, Activity],
        ranks: Ranks = ALONE,
    ) -> None:
        self._model, self._graph, self._batches, self._ranks = model, graph, batches, ranks
        self._activities = activities
        self._state = tensors(model)
        self._work = rebuild(model, self._state)
        self._modules = dict(model.named_modules())
        self.start()

    def start(self) -> None:
        """Begin anew with the original."""
        self.merger = Merger(self._state)
        self._merged = False

    @property
    def state(self) -> dict[str, Tensor]:
        """Tensors by name as they are now, see `Merger`."""
        return self.merger.state

    def finish(self) -> dict[str, Tensor]:
        """All parameters and buffers, merged and at their new sizes."""
        return self.merger.finish()

    def network(self) -> nn.Module:
        """The network as it is now, with zeros where neurons were merged away; the next merge changes it."""
        for name, tensor in [*self._work.named_parameters(), *self._work.named_buffers()]:
            tensor.data = self.merger.state[name]
        return self._work

    def merge(self, group: Group, labels: Tensor) -> None:
        """Merge one group and compensate for it.

        A group that keeps all its neurons is compensated, too, for what was merged before it.

        Args:
            group: the group.
            labels: as `Merger.merge` takes them.

        Raises:
            RankError: another rank failed, or was lost.
        """
        labels = labels.cpu()
        if not self._merged and keeps_all(labels):
            return
        self._merged = True
        assigned = Assigned(group, labels)
        activity = self._activities.get(group.name)
        self.merger.merge_made(group, labels, None if activity is None else activity.masses())
        whole = dict(self.merger.state)  # with what is read as it was
        self.merger.merge_read(group, labels)
        work = self.network()
        found = {reading.layer: reading for reading in readings(self._model, group)}
        with evaluating(self._model), evaluating(work):
            calls = count_calls(self._model, self._batches[0], found)
            sums = {
                layer: _Sums(reading, self._modules[layer], assigned, whole, self.merger.state)
                for layer, reading in found.items()
                if layer in calls
            }

            def looked(batch: ExampleInputs) -> dict[str, _Terms]:
                before = captured(self._model, batch, calls)
                rows = _MOST_ROWS // len(self._batches)
                most = {layer: max(1, rows // max(1, len(values))) for layer, values in before.items()}
                terms = {layer: _Terms() for layer in sums}

                def take(layer: str, merged: Tensor) -> None:
                    original = before[layer].pop(0) if before[layer] else None  # not needed any more
                    sums[layer].add(terms[layer], original, merged, most[layer])

                look(work, batch, calls, take)
                for layer, left in before.items():
                    terms[layer].comparable &= not left
                return terms

            for terms in self._ranks.share(self._batches if sums else (), looked):
                for layer, one in sums.items():
                    one.total.take(terms[layer])
        for layer, one in sums.items():
            if one.total.comparable:
                self._change(layer, one)

    def _change(self, layer: str, sums: "_Sums") -> None:
        state = self.merger.state
        weight = f"{layer}.weight"
        bias, norm = f"{layer}.bias", self._graph.norms.get(weight)
        target, sign = (bias, 1) if bias in state else (norm.mean if norm is not None else None, -1)
        columns, constant = sums.solved(intercept=target is not None)
        member = sums.reading.member
        changed = state[weight].clone()
        view = changed.movedim(member.dim, 0)
        places = sent(member.index[sums.assigned.first], view.device)
        view[places] = (view[places].to(columns.dtype) + columns).to(view.dtype)
        state[weight] = changed
        if target is not None:
            state[target] = (state[target].to(constant.dtype) + sign * constant).to(state[target].dtype)


@dataclass
class _Terms:
    """What is summed up over samples: of the merged neurons and what they lack, of the values and the outputs' errors.

    Attributes:
        comparable: the original and the merged network called the layer with the same samples, as far as shapes tell.
            Which samples an expert gets may depend on what was merged; then it cannot be compensated.
    """

    neurons: Moments = field(default_factory=Moments)
    missing: Moments = field(default_factory=Moments)
    values: Moments = field(default_factory=Moments)
    errors: Moments = field(default_factory=Moments)
    comparable: bool = True

    def take(self, other: "_Terms") -> None:
        """Take in those of another batch."""
        for name in ("neurons", "missing", "values", "errors"):
            getattr(self, name).take(getattr(other, name))
        self.comparable = self.comparable and other.comparable


class _Sums:
    """What is summed up for one layer that reads, and what follows from it.

    Attributes:
        reading: the layer.
        assigned: what it reads.
        total: of all batches.
    """

    def __init__(
        self,
        reading: Reading,
        module: nn.Module,
        assigned: Assigned,
        whole: Mapping[str, Tensor],
        merged: Mapping[str, Tensor],
    ) -> None:
        weight = whole[reading.member.tensor]
        self.reading, self.assigned, self._module = reading, assigned, module
        self._whole = outgoing(weight, reading.member)  # [n, m, ...]
        self._merged = outgoing(merged[reading.member.tensor], reading.member)[assigned.first]  # [k, m, ...]
        self._index = sent(reading.member.index, weight.device)
        self._first = self._index[assigned.first]
        self._summing = sent(assigned.summing, weight.device)
        self.total = _Terms()
        self._several = self._whole[0].numel() > self._outputs(self._whole).shape[0]

    def _outputs(self, columns: Tensor) -> Tensor:
        """Columns [n, m, out, *kernel] or [n, m, out] as [out, n, m, *kernel]."""
        return columns.movedim(2, 0)

    def add(self, terms: _Terms, original: Tensor | None, merged: Tensor, most: int) -> None:
        """Add what one call of the layer says.

        Args:
            terms: those of a batch.
            original: what it was called with in the original network; None if it was not.
            merged: the same in the merged network.
            most: positions to look at in the second regression.
        """
        terms.comparable &= original is not None and original.shape == merged.shape
        if original is None or not terms.comparable:
            return
        a = floating(samples(self._module, original, self._index))
        b = floating(samples(self._module, merged, self._first))
        terms.neurons.add(b, b)
        terms.missing.add(b, a - b @ self._summing.T.to(b.dtype))
        if self._several:
            self._add_values(terms, original, merged, most)

    def _add_values(self, terms: _Terms, original: Tensor, merged: Tensor, most: int) -> None:
        part = _convolved if isinstance(self._module, nn.modules.conv._ConvNd) else _multiplied
        _, whole = part(self._module, original, self._index, self._outputs(self._whole), most)
        values, made = part(self._module, merged, self._first, self._outputs(self._merged), most)
        terms.values.add(values, values)
        terms.errors.add(values, whole - made)

    def solved(self, *, intercept: bool) -> tuple[Tensor, Tensor]:
        """What to add to the columns of the merged neurons, float64 [k, m, ...], and to the outputs, [out].

        Args:
            intercept: there is a place for the constant; else it is to be made up for by the columns as well.
        """
        whole, total = self._whole.double(), self.total
        if not total.neurons.count:
            return torch.zeros_like(whole[self.assigned.first]), whole.new_zeros(whole.shape[2])
        flat = whole.flatten(3).sum(-1).sum(1) if whole.ndim > 3 else whole.sum(1)  # [n, out]
        extra = ridge(total.neurons.about(intercept), total.missing.about(intercept), RIDGE_NEURONS)  # [k, n]
        columns = torch.einsum("kn,n...->k...", extra, whole)
        constant = torch.zeros_like(flat[0])
        if intercept:
            merged, missing = total.neurons.means[0], total.missing.means[1]
            constant = (missing - merged @ extra) @ flat
        if not self._several:
            return columns, constant
        moved = self._outputs(columns).flatten(1).T  # [values, out]
        values = total.values.about(intercept)
        more = ridge(values, total.errors.about(intercept) - values @ moved, _RIDGE_VALUES)
        if intercept:
            mean, missing = total.errors.means
            constant = missing - mean @ (moved + more)
        like = self._outputs(columns)
        return columns + more.T.reshape(like.shape).movedim(0, 2), constant


def _multiplied(module: nn.Module, inputs: Tensor, index: Tensor, weight: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """What a linear layer reads of some neurons, [rows, values], and makes of it, [rows, out]; weight [out, n, m]."""
    values = floating(by_channel(module, inputs).flatten(0, -2))[:, index.flatten()]
    values = values[:: max(1, len(values) // most)]
    return values, values @ weight.flatten(1).T.to(values.dtype)


def _convolved(module: nn.Module, inputs: Tensor, index: Tensor, weight: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The same of a convolution, at some of its positions; weight [out, n, 1, *kernel]."""
    assert isinstance(module, nn.modules.conv._ConvNd), "chosen by the caller"
    spatial = len(module.kernel_size)
    x = inputs if inputs.ndim == spatial + 2 else inputs[None]
    x = floating(x)[:, index.flatten()]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    windows = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    for at, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), 2
    ):
        windows = windows.unfold(at, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
    rows = len(x) * math.prod(windows.shape[2 : 2 + spatial])
    step = max(1, math.ceil((rows / most) ** (1 / spatial)))
    for at in range(2, 2 + spatial):
        here = min(step, windows.shape[at])
        windows = windows[(slice(None),) * at + (slice((windows.shape[at] - 1) % here // 2, None, here),)]
    values = windows.movedim(1, 1 + spatial).flatten(0, spatial).flatten(1)  # channels before the kernel
    return values, values @ weight.flatten(1).T.to(values.dtype)
