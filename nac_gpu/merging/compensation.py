"""Compensation: the consumers of a merged group are refitted to reproduce their original outputs.

The original and the merged network run on the same inputs. Two ridge regressions on their activations then correct the
weights of each consumer:

- every original neuron is regressed on all merged ones, shrunk towards the sum of Eq. (9). The coefficients are folded
  into the columns of the weight;
- if the consumer reads several values of each neuron (positions of a kernel, channels of a head), the remaining error
  of its outputs is regressed on these values, shrunk towards the first result.

The intercepts go to the consumer's bias, or to the running mean of the BatchNorm after it. Groups are compensated in
the order of the forward pass, on the activations of the merged network, so that later consumers also correct the errors
that earlier ones left.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nac_gpu.calibration.activity import Activity
from nac_gpu.calibration.batches import Batches
from nac_gpu.calibration.moments import RIDGE_NEURONS, Moments, ridge
from nac_gpu.calibration.readings import Reading, by_channel, columns_of, outgoing, readings, samples
from nac_gpu.clustering.labels import first_of_each
from nac_gpu.distributed.fallbacks import StepError, attempt
from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.merging.centroids import Merger, keeps_all
from nac_gpu.network.copying import copied, rebuild
from nac_gpu.network.moving import sent
from nac_gpu.network.precision import floating
from nac_gpu.network.running import evaluating
from nac_gpu.network.state import tensors
from nac_gpu.network.watching import captured, count_calls, look
from nac_gpu.tracing.graph import Graph, Group

_RIDGE_VALUES = 5e-2  # ridge penalty of the second regression, relative to the mean square of the values
_KEPT_BYTES = 1 << 28  # of what the consumers of one group read in the original network
_MOST_ROWS = 32768  # samples of the second regression, over all batches


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
        """The first neuron of each cluster, at whose position the cluster is stored: int64 [k]."""
        return first_of_each(self.labels)

    @property
    def summing(self) -> Tensor:
        """The matrix of Eq. (9): float64 [n, k], one where a neuron is in a cluster."""
        clusters = torch.arange(int(self.labels.max()) + 1)
        return (self.labels[:, None] == clusters).double()


class Compensator:
    """Merges groups one after another, and refits their consumers.

    Attributes:
        merger: merges the tensors.
        failures: lines that say which consumers could not be refitted, and why.

    Args:
        model: the original; not changed, and not run.
        graph: its record.
        batches: inputs of the model.
        activities: activations and outgoing weights on these inputs, by the name of the group.
        ranks: the processes that divide the batches among them.
        repeated: each group is merged several times, to other widths, before the next one: what its consumers read in
            the original network is kept meanwhile, if that takes little memory.
        dtypes: in which the tensors will be used in the end, by name, if not in the model's own; they must fit.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        batches: Batches,
        activities: Mapping[str, Activity],
        ranks: Ranks = ALONE,
        *,
        repeated: bool = False,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self._dtypes = dtypes or {}
        self.failures: list[str] = []
        self._original, self._graph, self._batches, self._ranks = model, graph, batches, ranks
        self._model = copied(model)  # to be run
        self._activities = activities
        self._state = tensors(model)
        self._modules = dict(model.named_modules())
        self._calls: dict[str, int] | None = None
        self._repeated = repeated
        self._kept: tuple[str, dict[int, dict[str, list[Tensor]]]] = ("", {})
        self.start()

    def start(self) -> None:
        """Start again from the original."""
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
        """A network merged so far, to be run, with zeros at the positions of dropped neurons."""
        return rebuild(self._original, self.merger.state, clone=True)

    def merge(self, group: Group, labels: Tensor) -> None:
        """Merge one group and refit its consumers.

        The consumers of a group that keeps all its neurons are refitted, too, if an earlier group was merged.

        Args:
            group: the group.
            labels: as `Merger.merge` takes them.

        Raises:
            RankError: another rank failed or was lost.
        """
        labels = labels.cpu()
        if not self._merged and keeps_all(labels):
            return
        self._merged = True
        assigned = Assigned(group, labels)
        activity = self._activities.get(group.name)
        self.merger.merge_made(group, labels, None if activity is None else activity.masses())
        whole = dict(self.merger.state)  # consumers not merged yet
        self.merger.merge_read(group, labels)
        found = {reading.layer: reading for reading in readings(self._model, group)}
        try:
            sums = attempt(lambda ranks: self._summed(assigned, found, whole, ranks), self._ranks)
        except StepError as error:  # the merged network may not run on some inputs
            self._say(found, error)
            return
        for layer, one in sums.items():
            if one.total.comparable:
                try:
                    attempt(lambda _, layer=layer, one=one: self._change(layer, one))
                except StepError as error:
                    self._say([layer], error)

    def _say(self, layers: Iterable[str], error: StepError) -> None:
        self.failures.append(f"{', '.join(layers)}: not compensated, because that failed ({error})")

    def _summed(
        self, assigned: Assigned, found: Mapping[str, Reading], whole: Mapping[str, Tensor], ranks: Ranks
    ) -> "dict[str, _Sums]":
        """The regressions of the consumers of a group that was merged, by layer.

        Args:
            assigned: the group.
            found: what its consumers read, by layer.
            whole: tensors of the network with consumers not merged yet.
            ranks: the processes that divide the batches among them.
        """
        work = self.network()
        with evaluating(self._model), evaluating(work):
            calls = self._calls_of(found, ranks)
            sums = {
                layer: _Sums(reading, self._modules[layer], assigned, whole, self.merger.state)
                for layer, reading in found.items()
                if layer in calls
            }

            def observed(number: int) -> dict[str, _Terms]:
                batch = self._batches[number]
                before = self._originally(assigned.group, number, calls)
                rows = _MOST_ROWS // len(self._batches)
                most = {layer: max(1, rows // max(1, len(values))) for layer, values in before.items()}
                terms = {layer: _Terms() for layer in sums}

                def take(layer: str, merged: Tensor) -> None:
                    original = before[layer].pop(0) if before[layer] else None  # pop frees its memory
                    sums[layer].add(terms[layer], original, merged, most[layer])

                look(work, batch, calls, take)
                for layer, left in before.items():
                    terms[layer].comparable &= not left
                return terms

            for terms in ranks.share(range(len(self._batches)) if sums else (), observed):
                for layer, one in sums.items():
                    one.total.take(terms[layer])
        return sums

    def _calls_of(self, layers: Iterable[str], ranks: Ranks) -> dict[str, int]:
        """How often each of these layers is called in a pass of the original; those that are not called are left out.

        All layers are counted in one pass.
        """
        if self._calls is None:
            plain = [name for name, module in self._modules.items() if columns_of(module) is not None]
            (self._calls,) = ranks.share([None], lambda _: count_calls(self._model, self._batches[0], plain))
        return {layer: self._calls[layer] for layer in layers if layer in self._calls}

    def _originally(self, group: Group, number: int, calls: Mapping[str, int]) -> dict[str, list[Tensor]]:
        """What the consumers of a group are called with in the original network, on one of the batches."""
        if self._kept[0] != group.name:
            self._kept = group.name, {}
        kept = self._kept[1]
        if number in kept:
            return {layer: list(values) for layer, values in kept[number].items()}
        found = captured(self._model, self._batches[number], calls)
        size = sum(value.numel() * value.element_size() for values in found.values() for value in values)
        if self._repeated and size * len(self._batches) <= _KEPT_BYTES:
            kept[number] = {layer: list(values) for layer, values in found.items()}
        return found

    def _change(self, layer: str, sums: "_Sums") -> None:
        """Refit a consumer.

        Raises:
            ValueError: the result is not finite.
        """
        state = self.merger.state
        weight = f"{layer}.weight"
        bias, norm = f"{layer}.bias", self._graph.norms.get(weight)
        target, sign = (bias, 1) if bias in state else (norm.mean if norm is not None else None, -1)
        columns, constant = sums.solved(intercept=target is not None)
        member = sums.reading.member
        changed = {weight: state[weight].clone()}
        view = changed[weight].movedim(member.dim, 0)
        places = sent(member.index[sums.assigned.first], view.device)
        view[places] = (view[places].to(columns.dtype) + columns).to(view.dtype)
        if target is not None:
            changed[target] = (state[target].to(constant.dtype) + sign * constant).to(state[target].dtype)
        for name, tensor in changed.items():
            if not bool(torch.isfinite(tensor.to(self._dtypes.get(name, tensor.dtype))).all()):
                raise ValueError(f"{name} would not be finite")
        state.update(changed)


@dataclass
class _Terms:
    """Sums over samples.

    Attributes:
        neurons: moments of the merged neurons.
        missing: of the merged neurons with the residuals of the original neurons.
        values: of the values that the consumer reads.
        errors: of these values with the errors of the consumer's outputs.
        comparable: the original and the merged network called the consumer with the same number of samples. A router
            may send other samples to an expert after merging; such an expert is not compensated.
    """

    neurons: Moments = field(default_factory=Moments)
    missing: Moments = field(default_factory=Moments)
    values: Moments = field(default_factory=Moments)
    errors: Moments = field(default_factory=Moments)
    comparable: bool = True

    def take(self, other: "_Terms") -> None:
        """Add the sums of another batch."""
        for name in ("neurons", "missing", "values", "errors"):
            getattr(self, name).take(getattr(other, name))
        self.comparable = self.comparable and other.comparable


class _Sums:
    """The two regressions of one consumer.

    Attributes:
        reading: the consumer.
        assigned: the group that it reads, with its clusters.
        total: sums over all batches.
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
        """Add the samples of one call of the consumer.

        Args:
            terms: sums of the batch.
            original: input of the consumer in the original network; None if it was not called.
            merged: its input in the merged network.
            most: number of samples for the second regression.
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
        """The corrections of the merged columns, float64 [k, m, ...], and of the outputs (the intercept), [out].

        Args:
            intercept: fit an intercept; without it the columns alone have to correct the mean.
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
    """A linear layer's inputs from some neurons, [rows, values], and its outputs, [rows, out]; weight [out, n, m]."""
    values = floating(by_channel(module, inputs).flatten(0, -2))[:, index.flatten()]
    values = values[:: max(1, len(values) // most)]
    return values, values @ weight.flatten(1).T.to(values.dtype)


def _convolved(module: nn.Module, inputs: Tensor, index: Tensor, weight: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The same for a convolution, on a subset of its output positions; weight [out, n, 1, *kernel]."""
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
    values = windows.movedim(1, 1 + spatial).flatten(0, spatial).flatten(1)  # channels first, then the kernel
    return values, values @ weight.flatten(1).T.to(values.dtype)
