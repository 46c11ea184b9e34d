"""One consumer of a merged group: what it reads in the original and in the merged network."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nac_gpu.calibration.batches import Batches
from nac_gpu.calibration.moments import Part, folds_of
from nac_gpu.calibration.readings import Reading, by_channel, outgoing, row_weights, samples
from nac_gpu.clustering.labels import first_of_each
from nac_gpu.merging.regression import Fit, Terms, empty_folds, fitted, rows_of
from nac_gpu.network.moving import sent
from nac_gpu.network.padding import counted, padding_of
from nac_gpu.network.precision import floating
from nac_gpu.tracing.graph import Group

_ALL_ROWS = sys.maxsize


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
    def only_removes(self) -> bool:
        """Whether no neurons are merged: each cluster is one of them."""
        return int((self.labels >= 0).sum()) == self.first.numel()

    @property
    def summing(self) -> Tensor:
        """The matrix of Eq. (9): float64 [n, k], one where a neuron is in a cluster."""
        clusters = torch.arange(int(self.labels.max()) + 1)
        return (self.labels[:, None] == clusters).double()


@dataclass(frozen=True)
class Sample:
    """One of the batches: its number, how many there are, and which of its positions count (None: all)."""

    number: int
    batches: int
    mask: Tensor | None

    @staticmethod
    def of(batches: Batches, number: int) -> "Sample":
        """The batch of this number."""
        return Sample(number, len(batches), padding_of(batches[number]))

    def folds(self, rows: int) -> list[tuple[int, slice]]:
        """See `nac_gpu.calibration.moments.folds_of`."""
        return folds_of(self.number, self.batches, rows)


class Consumer:
    """The regression of one consumer.

    Attributes:
        reading: the consumer.
        assigned: the group that it reads, with its clusters.
        total: sums over all batches, by fold.
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
        self.total = empty_folds()
        self._several = self._whole[0].numel() > self._outputs(self._whole).shape[0]

    @property
    def comparable(self) -> bool:
        """Whether both networks called the consumer with the same samples."""
        return all(terms.comparable for terms in self.total)

    def _outputs(self, columns: Tensor) -> Tensor:
        """Columns [n, m, out, *kernel] or [n, m, out] as [out, n, m, *kernel]."""
        return columns.movedim(2, 0)

    def add(self, terms: Sequence[Terms], original: Tensor | None, merged: Tensor, parts: int, sample: Sample) -> None:
        """Add the samples of one call of the consumer.

        Args:
            terms: sums of the batch, by fold.
            original: input of the consumer in the original network; None if it was not called.
            merged: its input in the merged network.
            parts: how many calls the samples are divided among.
            sample: of which batch.
        """
        if original is None or original.shape != merged.shape:
            terms[0].comparable = False
            return
        original, merged = (counted(self._module, given, sample.mask) for given in (original, merged))
        part = _convolved if isinstance(self._module, nn.modules.conv._ConvNd) else _multiplied
        # Of a consumer that reads one value a neuron all samples are used: its regression is small.
        most = _ALL_ROWS
        if self._several:
            most = max(1, rows_of(self._first.numel() * self._whole[0, 0, 0].numel()) // parts)
        read, whole = part(self._module, original, self._index, self._outputs(self._whole), most)
        values, made = part(self._module, merged, self._first, self._outputs(self._merged), most)
        weights = row_weights(read)
        for fold, rows in sample.folds(len(values)):
            terms[fold].add(values[rows], whole[rows], made[rows], weights[rows])
        if self._several:
            a = floating(samples(self._module, original, self._index))
            b = floating(samples(self._module, merged, self._first))
            missing, weights = a - b @ self._summing.T.to(b.dtype), row_weights(a)
            for fold, rows in sample.folds(len(b)):
                terms[fold].neurons.add(b[rows], b[rows], weights[rows])
                terms[fold].missing.add(b[rows], missing[rows], weights[rows])

    def know(self, parts: Sequence[Part]) -> None:
        """Take the samples from their moments, where neurons are only removed and all others are as in the original.

        Args:
            parts: moments of all values that the consumer reads, [n * m] each: of one half of the inputs and of the
                other.
        """
        first = sent(self.assigned.first, self._index.device)
        kept = torch.arange(self._index.numel(), device=self._index.device).view_as(self._index)[first].flatten()
        whole = self._outputs(self._whole).flatten(1).double()
        missing = whole.clone()
        missing[:, kept] -= self._outputs(self._merged).flatten(1).double()
        for terms, part in zip(self.total, parts, strict=False):
            terms.values, terms.errors = part.moments(kept, missing)
            terms.energy = part.energy(missing, centred=False)
            terms.variance = part.energy(whole, centred=True)
            if self._several:
                absent = torch.eye(len(self._index), dtype=torch.float64, device=kept.device)
                absent[first] = 0
                terms.neurons, terms.missing = part.pooled(len(self._index)).moments(first, absent)

    def solved(self, *, intercept: bool) -> Fit | None:
        """The best correction of the merged columns, see `spread`, and of the outputs; None without samples.

        Args:
            intercept: fit a constant; without it the columns alone have to correct the mean.
        """
        whole = self._whole.double()

        def spread(extra: Tensor) -> Tensor:
            return self._outputs(torch.einsum("kn,n...->k...", extra, whole)).flatten(1).T

        return fitted(self.total, spread if self._several else None, intercept=intercept)

    def columns(self, weight: Tensor) -> Tensor:
        """Coefficients [p, out] as columns of the consumer's weight, [k, m, ...]."""
        like = self._outputs(self._merged)
        return weight.T.reshape(like.shape).movedim(0, 2)


def _multiplied(module: nn.Module, inputs: Tensor, index: Tensor, weight: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """A linear layer's inputs from some neurons, [rows, values], and its outputs, [rows, out]; weight [out, n, m]."""
    values = floating(by_channel(module, inputs).flatten(0, -2))[:, index.flatten()]
    values = values[:: max(1, len(values) // most)]  # there may be none: an expert that gets no tokens
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
    long = sum(size > 1 for size in windows.shape[2 : 2 + spatial])  # dimensions
    step = max(1, math.ceil((rows / most) ** (1 / max(1, long))))
    for at in range(2, 2 + spatial):
        here = min(step, windows.shape[at])
        windows = windows[(slice(None),) * at + (slice((windows.shape[at] - 1) % here // 2, None, here),)]
    values = windows.movedim(1, 1 + spatial).flatten(0, spatial).flatten(1)  # channels first, then the kernel
    return values, values @ weight.flatten(1).T.to(values.dtype)
