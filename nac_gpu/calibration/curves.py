"""What merging a group costs, by the number of neurons that are kept."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nac_gpu.calibration.activity import Activity
from nac_gpu.calibration.moments import RIDGE_NEURONS, damped
from nac_gpu.clustering.dendrogram import Dendrogram

_MOST = 1 - 1e-6  # a group whose error is complete costs this much, not infinitely much
Curve = Mapping[int, float]


def widths_to_try(size: int, ratio: float = 2**0.25) -> list[int]:
    """Numbers of clusters at which a curve is worked out, ascending: about one in every `ratio`."""
    steps = math.ceil(math.log(size) / math.log(ratio)) + 1
    return sorted({max(1, round(size / ratio**step)) for step in range(steps)})


def error_curve(cut: Callable[[int], Tensor], size: int, activity: Activity) -> Curve:
    """The error of merging a group to k neurons, by k.

    Args:
        cut: gives labels, int64 [n], for a number of clusters.
        size: number n of neurons.
        activity: how they are read.
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
    if found:  # the host waits for a device once
        rows = torch.stack([*found.values()]).tolist()
        assert all(math.isfinite(error) for row in rows for error in row), "covariances are finite, and damped"
        curve |= {kept: sum(row) / len(row) for kept, row in zip(found, rows, strict=True)}
    return dict(sorted(curve.items()))


def _left(covariance: Tensor, gain: Tensor, summing: Tensor, means: Tensor) -> Tensor:
    """The share of the variance of what a reader makes that is lost, a scalar."""
    whole = (covariance * gain).sum()
    crossed = means.T @ covariance  # [k, n]
    merged = crossed @ means  # [k, k]
    missing = crossed - merged @ summing.T
    # This one does not make the host wait to see whether it failed.
    factor, failed = torch.linalg.cholesky_ex(damped(merged, RIDGE_NEURONS))
    back = summing + torch.cholesky_solve(missing, factor).T  # [n, k]
    mixed = back @ crossed
    left = covariance - mixed - mixed.T + back @ merged @ back.T
    some = whole > 0
    share = ((left * gain).sum() / torch.where(some, whole, 1)).clamp(0.0, _MOST)
    return torch.where(some, torch.where(failed == 0, share, torch.nan), 0.0)


def inertia_curve(tree: Dendrogram) -> Curve:
    """The same for a group of which only the weights are known: the share of their variance within clusters.

    Every merge adds its cost to the variance within clusters, until all of it is there.
    """
    within = tree.heights.double().square().cumsum(0).tolist()
    return {
        kept: min(within[tree.n - kept - 1] / within[-1], _MOST) if kept < tree.n and within[-1] > 0 else 0.0
        for kept in widths_to_try(tree.n)
    }


def loss_at(losses: Curve, width: int) -> float:
    """What a curve says of a width, between known widths linear in the width's logarithm."""
    if width in losses:
        return losses[width]
    known = sorted(losses)
    above = next(i for i, k in enumerate(known) if k > width)
    low, high = known[above - 1], known[above]
    part = math.log(width / low) / math.log(high / low)
    return (1 - part) * losses[low] + part * losses[high]
