"""Second moments of samples, accumulated batch by batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE_NEURONS = 1e-2  # ridge penalty, relative to the mean square of the merged activations
FOLDS = 4  # parts of the inputs; what is fitted to some is judged on another


def damped(gram: Tensor, share: float) -> Tensor:
    """A Gram matrix [p, p] with a share of its mean diagonal added to the diagonal: what ridge regression inverts."""
    found = gram.clone()
    found.diagonal().add_((share * gram.diagonal().mean()).clamp_min(1e-30))
    return found


def ridge(inputs: Tensor, targets: Tensor, share: float) -> Tensor:
    """Ridge regression from moments.

    Args:
        inputs: moments of the inputs, [p, p].
        targets: moments of the inputs with the targets, [p, q].
        share: the ridge, as a share of the inputs' mean square.

    Returns:
        Coefficients [p, q]; zeros where the inputs are zeros.
    """
    if not float(inputs.diagonal().mean()) > 0:
        return torch.zeros_like(targets)
    return torch.cholesky_solve(targets, torch.linalg.cholesky(damped(inputs, share)))


def folds_of(number: int, batches: int, rows: int) -> list[tuple[int, slice]]:
    """Which samples of a batch are in which fold: pairs of a fold and a slice of the rows.

    With several batches each is in one fold. With fewer than there are folds, a batch is divided into consecutive
    parts: samples of the same input are mostly in one.

    Args:
        number: of the batch.
        batches: how many there are.
        rows: samples of the batch, those of an input next to each other.
    """
    if batches >= FOLDS:
        return [(number % FOLDS, slice(0, rows))]
    ends = [round(rows * part / FOLDS) for part in range(FOLDS + 1)]
    return [(fold, slice(ends[fold], ends[fold + 1])) for fold in range(FOLDS) if ends[fold] < ends[fold + 1]]


class Moments:
    """Means and covariance of samples `a` and `b`, accumulated in float64 around the mean of the first batch.

    Each batch is summed up by itself and then added in order. So the result has the same bits whichever rank computed
    a batch.

    Attributes:
        count: of the samples; the sum of their weights, where they have any.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self._product: Tensor | float = 0.0
        self._sums: list[Tensor] = []
        self._centres: list[Tensor] = []

    def add(self, a: Tensor, b: Tensor, weights: Tensor | None = None) -> None:
        """Add samples: [samples, p] and [samples, q], which may have weights, [samples]."""
        if not len(a):
            return
        if not self._centres:
            self._centres = [a.mean(0), b.mean(0)]
            self._sums = [torch.zeros_like(centre, dtype=torch.float64) for centre in self._centres]
        a, b = a - self._centres[0], b - self._centres[1]
        weighted, other = (a, b) if weights is None else (a * weights[:, None], b * weights[:, None])
        self.count += len(a) if weights is None else float(weights.sum(dtype=torch.float64))
        product = weighted.T @ b
        # in its own type while it is the only one: the sums of a batch wait to be added to others
        self._product = self._product.double().add_(product) if isinstance(self._product, Tensor) else product
        parts = (weighted, other)
        self._sums = [total + part.sum(0, dtype=torch.float64) for total, part in zip(self._sums, parts, strict=True)]

    def take(self, other: "Moments") -> None:
        """Add the sums of another one, whose memory is reused: do not use it afterwards."""
        if not self.count or not other.count:
            if other.count:
                vars(self).update(vars(other))
            return
        a, b = (new.double() - old.double() for new, old in zip(other._centres, self._centres, strict=True))
        assert isinstance(other._product, Tensor), "it has samples"
        moved = other._product.double().addr_(other._sums[0], b).addr_(a, other._sums[1] + other.count * b)
        self._product = moved.add_(self._product)
        self._sums = [
            total + part + other.count * shift
            for total, part, shift in zip(self._sums, other._sums, (a, b), strict=True)
        ]
        self.count += other.count

    def copy(self) -> "Moments":
        """Sums of their own, to which others may be added."""
        made = Moments()
        vars(made).update(vars(self))
        if isinstance(self._product, Tensor):
            made._product = self._product.to(torch.float64, copy=True)
        return made

    @staticmethod
    def known(count: float, means: Sequence[Tensor], covariance: Tensor) -> "Moments":
        """From the number of samples, the means of a [p] and b [q], and their covariance [p, q], in float64."""
        made = Moments()
        made.count, made._centres, made._product = count, list(means), covariance * count
        made._sums = [torch.zeros_like(mean) for mean in means]
        return made

    @staticmethod
    def total(parts: Sequence["Moments"]) -> "Moments":
        """The moments of the samples of all parts, which stay as they are."""
        made = Moments()
        for part in parts:
            made.take(part.copy())
        return made

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """The mean of a [p] and of b [q]."""
        a, b = (centre + total / self.count for centre, total in zip(self._centres, self._sums, strict=True))
        return a, b

    @property
    def covariance(self) -> Tensor:
        """The covariance of a and b, float64 [p, q]."""
        product = torch.as_tensor(self._product, dtype=torch.float64)
        return product / self.count - torch.outer(self._sums[0], self._sums[1]) / self.count**2

    @property
    def second(self) -> Tensor:
        """The mean product of a and b, float64 [p, q]."""
        return self.covariance + torch.outer(*self.means)

    def about(self, mean: bool) -> Tensor:
        """The moments about the mean, or about zero: `covariance` or `second`."""
        return self.covariance if mean else self.second

    def part(self) -> "Part":
        """The moments of samples `a`, where `b` are the same; there must be samples."""
        return Part(self.count, self.means[0], self.covariance.float())


@dataclass(frozen=True)
class Part:
    """What is kept of the moments of a part of the samples.

    Attributes:
        count: of the samples, by weight.
        mean: float64 [p].
        covariance: float32 [p, p].
    """

    count: float
    mean: Tensor
    covariance: Tensor

    def about(self, mean: bool) -> Tensor:
        """The moments about the mean, or about zero: float32 [p, p]."""
        return self.covariance if mean else self.covariance + torch.outer(self.mean, self.mean).float()

    def moments(self, kept: Tensor, weights: Tensor) -> tuple[Moments, Moments]:
        """The moments of some of the values, with each other and with linear functions of all.

        Args:
            kept: int64 [k], places of values.
            weights: float64 [q, p], of the functions.
        """
        rows = self.covariance[kept].double()
        mean = self.mean[kept]
        own = Moments.known(self.count, (mean, mean), rows[:, kept])
        return own, Moments.known(self.count, (mean, weights @ self.mean), rows @ weights.T)

    def pooled(self, size: int) -> "Part":
        """The moments of neurons with m values each, [n * m], where each of these is a sample of its own.

        Args:
            size: number n of neurons.
        """
        blocks = self.about(mean=False).view(size, -1, size, len(self.mean) // size)
        mean = self.mean.view(size, -1).mean(1)
        second = blocks.diagonal(dim1=1, dim2=3).mean(-1)
        return Part(self.count, mean, second - torch.outer(mean, mean).float())

    def energy(self, weights: Tensor, *, centred: bool) -> float:
        """The sum of squares of linear functions, over samples and functions.

        Args:
            weights: float64 [q, p].
            centred: of their deviations from the mean.
        """
        found = float(((weights @ self.covariance.double()) * weights).sum())
        return self.count * (found + (0.0 if centred else float((weights @ self.mean).square().sum())))
