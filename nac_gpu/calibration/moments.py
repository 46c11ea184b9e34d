"""Second moments of samples, accumulated batch by batch."""

import torch
from torch import Tensor

RIDGE_NEURONS = 1e-2  # ridge penalty, relative to the mean square of the merged activations


def damped(gram: Tensor, share: float) -> Tensor:
    """A Gram matrix [p, p] with a share of its mean diagonal added to the diagonal: what ridge regression inverts."""
    unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return gram + (share * gram.diagonal().mean()).clamp_min(1e-30) * unit


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


class Moments:
    """Means and covariance of samples `a` and `b`, accumulated in float64 around the mean of the first batch.

    Each batch is summed up by itself and then added in order. So the result has the same bits whichever rank computed
    a batch.
    """

    def __init__(self) -> None:
        self.count = 0
        self._product: Tensor | float = 0.0
        self._sums: list[Tensor] = []
        self._centres: list[Tensor] = []

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add samples: [samples, p] and [samples, q]."""
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
        """Add the sums of another one, whose memory is reused: do not use it afterwards."""
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

    def about(self, mean: bool) -> Tensor:
        """The moments about the mean, or about zero: `covariance` or `second`."""
        return self.covariance if mean else self.second
