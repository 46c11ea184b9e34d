"""Error curves: the error of merging a group, as a function of the number of neurons kept."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nac_gpu.calibration.activity import Activity
from nac_gpu.calibration.moments import RIDGE_NEURONS, damped
from nac_gpu.clustering.dendrogram import Dendrogram

_MOST = 1 - 1e-6  # upper bound of an error, so that -log(1 - error) stays finite
Curve = Mapping[int, float]


def widths_to_try(size: int, ratio: float = 2**0.25) -> list[int]:
    """Numbers of clusters at which a curve is computed, ascending, spaced by a factor of about `ratio`."""
    steps = math.ceil(math.log(size) / math.log(ratio)) + 1
    return sorted({max(1, round(size / ratio**step)) for step in range(steps)})


def error_curve(cut: Callable[[int], Tensor], size: int, activity: Activity) -> Curve:
    """The error of merging a group to k neurons, by k, averaged over its consumers.

    Args:
        cut: returns labels, int64 [n], for a number of clusters.
        size: number n of neurons.
        activity: their activations and outgoing weights.
    """
    curve: dict[int, float] = {}
    found: dict[int, Tensor] = {}
    for kept in widths_to_try(size, 2**0.25 if size <= 1024 else 2**0.5):
        if kept == size:
            curve[kept] = 0.0
            continue
        labels = cut(kept).to(activity.gains[0].device)
        summing = (labels[:, None] == torch.arange(kept, device=labels.device)).to(activity.gains[0].dtype)
        means = summing / summing.sum(0)
        errors = [
            _left(covariance, gain, summing, means)
            for covariance, gain in zip(activity.covariances, activity.gains, strict=True)
        ]
        found[kept] = torch.stack(errors)
    if found:  # a single transfer, so that the host waits for the GPU only once
        rows = torch.stack([*found.values()]).tolist()
        assert all(math.isfinite(error) for row in rows for error in row), "covariances are finite, and damped"
        curve |= {kept: sum(row) / len(row) for kept, row in zip(found, rows, strict=True)}
    return dict(sorted(curve.items()))


def _left(covariance: Tensor, gain: Tensor, summing: Tensor, means: Tensor) -> Tensor:
    """The share of the variance of a consumer's output that is lost after refitting it, a scalar."""
    whole = (covariance * gain).sum()
    crossed = means.T @ covariance  # [k, n]
    merged = crossed @ means  # [k, k]
    missing = crossed - merged @ summing.T
    # Unlike `cholesky`, `cholesky_ex` does not make the host wait for the GPU to check for failure.
    factor, failed = torch.linalg.cholesky_ex(damped(merged, RIDGE_NEURONS))
    back = summing + torch.cholesky_solve(missing, factor).T  # [n, k]
    mixed = back @ crossed
    left = covariance - mixed - mixed.T + back @ merged @ back.T
    some = whole > 0
    share = ((left * gain).sum() / torch.where(some, whole, 1)).clamp(0.0, _MOST)
    return torch.where(some, torch.where(failed == 0, share, torch.nan), 0.0)


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
