"""Error curves: the error of making a group smaller, as a function of the number of neurons kept."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nac_gpu.calibration.activity import Activity
from nac_gpu.calibration.moments import RIDGE_NEURONS, damped
from nac_gpu.clustering.dendrogram import Dendrogram
from nac_gpu.network.moving import sent

_MOST = 1 - 1e-6  # upper bound of an error, so that -log(1 - error) stays finite
Curve = Mapping[int, float]


def widths_to_try(size: int, ratio: float = 2**0.25) -> list[int]:
    """Numbers of clusters at which a curve is computed, ascending, spaced by a factor of about `ratio`."""
    steps = math.ceil(math.log(size) / math.log(ratio)) + 1
    return sorted({max(1, round(size / ratio**step)) for step in range(steps)})


def error_curve(cut: Callable[[int], Tensor], size: int, activity: Activity) -> Curve:
    """The error of making a group smaller, by the number of neurons kept, averaged over its consumers.

    The consumers are refitted to one half of the inputs and judged on the other, and the other way round, or not
    refitted at all where that is better.

    Args:
        cut: returns labels, int64 [n], for a number of neurons: clusters, or -1 for removed ones.
        size: number n of neurons.
        activity: their activations and outgoing weights.
    """
    curve: dict[int, float] = {}
    found: dict[int, Tensor] = {}
    consumers = _consumers(activity)
    for kept in widths_to_try(size, 2**0.25 if size <= 1024 else 2**0.5):
        if kept == size:
            curve[kept] = 0.0
            continue
        labels = sent(cut(kept), activity.covariances[0].device)
        found[kept] = torch.stack([consumer.left(labels, kept) for consumer in consumers])
    if found:  # a single transfer, so that the host waits for the GPU only once
        rows = torch.stack([*found.values()]).tolist()
        assert all(math.isfinite(error) for row in rows for error in row), "covariances are finite, and damped"
        curve |= {kept: sum(row) / len(row) for kept, row in zip(found, rows, strict=True)}
    return dict(sorted(curve.items()))


def error_at(labels: Tensor, kept: int, activity: Activity) -> float:
    """The error of making a group smaller with these labels, as in `error_curve`.

    A merged neuron's activation is taken to be the mean of those of its members, which it is at best.
    """
    labels = labels.to(activity.covariances[0].device)
    return float(torch.stack([consumer.left(labels, kept) for consumer in _consumers(activity)]).mean())


def _consumers(activity: Activity) -> "list[_Consumer]":
    return [_Consumer(parts, weights) for parts, weights in zip(activity.parts(), activity.outgoing, strict=True)]


class _Consumer:
    """A consumer's outputs on the halves of the inputs.

    Args:
        halves: covariances of the neurons [n, n], one to fit to and one to judge by, and the other way round.
        weights: outgoing weights [n, q].
    """

    def __init__(self, halves: tuple[Tensor, ...], weights: Tensor) -> None:
        self._halves, self._weights = halves, weights.to(halves[0].dtype)
        self._crossed = [half @ self._weights for half in halves]
        self._whole = [(self._weights * crossed).sum() for crossed in self._crossed]

    def left(self, labels: Tensor, kept: int) -> Tensor:
        """The share of the variance of the outputs that is lost, a scalar."""
        at = torch.where(labels < 0, kept, labels)  # removed ones go to a cluster of their own, which is dropped

        def summed(values: Tensor) -> Tensor:
            """Sums over the neurons of each cluster: [k, ...] for [n, ...]."""
            zeros = values.new_zeros(kept + 1, values.shape[1])
            return zeros.index_put_((at,), values, accumulate=True)[:kept]  # the same bits on every run

        counts = summed(torch.ones_like(self._weights[:, :1]))
        start = summed(self._weights)  # Eq. (9)
        grams = [summed(summed(half).div_(counts).T).div_(counts) for half in self._halves]
        crossed = [summed(values).div_(counts) for values in self._crossed]
        shares = []
        for fit, judge in ((0, 1), (1, 0)):
            # Unlike `cholesky`, `cholesky_ex` does not make the host wait for the GPU to check for failure.
            factor, failed = torch.linalg.cholesky_ex(damped(grams[fit], RIDGE_NEURONS))
            more = torch.cholesky_solve(crossed[fit] - grams[fit] @ start, factor)
            lost = [
                self._whole[judge] + ((grams[judge] @ weights - 2 * crossed[judge]) * weights).sum()
                for weights in (start + more, start)
            ]
            lost[0] = torch.where(failed == 0, lost[0], lost[1])
            some = self._whole[judge] > 0
            best = torch.minimum(*lost)
            share = (best / torch.where(some, self._whole[judge], 1)).clamp(0.0, _MOST)
            shares.append(torch.where(some, share, 0.0))
        return torch.stack(shares).mean().double()


def inertia_curve(tree: Dendrogram) -> Curve:
    """The error curve of a group of which only the weights are known: the share of variance within clusters.

    The squared heights of Ward's merges add up to the variance within clusters.
    """
    within = tree.heights.double().square().cumsum(0).tolist()
    return {
        kept: min(within[tree.n - kept - 1] / within[-1], _MOST) if kept < tree.n and within[-1] > 0 else 0.0
        for kept in widths_to_try(tree.n)
    }


def loss_at(losses: Curve, width: int) -> float:
    """The value of a curve at a width, interpolated linearly in the logarithm of the width."""
    if width in losses:
        return losses[width]
    known = sorted(losses)
    above = next(i for i, k in enumerate(known) if k > width)
    low, high = known[above - 1], known[above]
    part = math.log(width / low) / math.log(high / low)
    return (1 - part) * losses[low] + part * losses[high]
