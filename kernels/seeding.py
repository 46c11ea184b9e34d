"""Where k-means starts: greedy k-means++, all centres in one launch."""

from __future__ import annotations  # without Triton there is no tl.constexpr

import torch
from torch import Tensor

from .backend import jit, launch, tl, triton, uses_triton

# Points that a program looks at at a time, for up to 16 candidates: four numbers for each of its threads.
_COLUMNS = 128
_WARPS = 16


def seed_centres(distances: Tensor, masses: Tensor, draws: Tensor) -> Tensor:
    """Choose points to start k-means from, by greedy k-means++, several times.

    Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007: each next centre is drawn in
    proportion to mass times squared distance to the nearest so far, several candidates a time, and the one that
    leaves the least is taken, the first of equals.

    Args:
        distances: [n, n], squared, zeros on the diagonal.
        masses: [n], positive.
        draws: [starts, k, candidates], in [0, 1); of the dtype of the distances.

    Returns:
        The chosen points, int64 [starts, k].
    """
    if not uses_triton(distances):
        return seed_centres_torch(distances, masses, draws)
    starts, k, candidates = draws.shape
    centres = torch.empty(starts, k, dtype=torch.int64, device=distances.device)
    scratch = distances.new_empty(starts, len(distances))
    launch(
        _seed_kernel,
        (starts,),
        distances,
        masses,
        draws.contiguous(),
        centres,
        scratch,
        len(distances),
        k,
        candidates,
        CANDIDATES=triton.next_power_of_2(candidates),
        COLUMNS=_COLUMNS,
        num_warps=_WARPS,
        enable_fp_fusion=False,
    )
    return centres


def seed_centres_torch(distances: Tensor, masses: Tensor, draws: Tensor) -> Tensor:
    """The plain PyTorch twin of `seed_centres`."""
    centres = torch.empty(draws.shape[:2], dtype=torch.int64, device=distances.device)
    for start in range(len(draws)):
        left = distances.amax(dim=1)  # above every distance, so that the first centre counts in full
        share = masses
        for i in range(draws.shape[1]):
            cumulative = share.cumsum(0)
            drawn = torch.searchsorted(cumulative, draws[start, i] * cumulative[-1], right=True)
            drawn.clamp_(max=len(masses) - 1)
            after = torch.minimum(left, distances[drawn])  # [candidates, n]
            chosen = (after @ masses).argmin()
            centres[start, i] = drawn[chosen]
            left = after[chosen]
            share = masses * left
    return centres


@jit
def _share(masses, scratch, points, n, i):
    """In proportion to what points are drawn as centre i: their mass, behind the first times the distance so far."""
    share = tl.load(masses + points, mask=points < n, other=0.0)
    if i > 0:
        share *= tl.load(scratch + points, mask=points < n, other=0.0)
    return share


@jit
def _seed_kernel(
    distances,
    masses,
    draws,
    centres,
    scratch,
    n,
    k,
    candidates,
    CANDIDATES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program a start. `scratch` [starts, n] holds the distance to the nearest centre so far."""
    start = tl.program_id(0).to(tl.int64)
    scratch += start * n
    draws += start * k * candidates
    candidate = tl.arange(0, CANDIDATES)
    lane = tl.arange(0, COLUMNS)
    none = tl.zeros((CANDIDATES,), distances.dtype.element_ty)
    for i in range(0, k):
        total = tl.sum(none, axis=0)
        for first in range(0, n, COLUMNS):
            total += tl.sum(_share(masses, scratch, first + lane, n, i), axis=0)
        goal = tl.load(draws + i * candidates + candidate, mask=candidate < candidates, other=0.0) * total

        # How many points are passed before the cumulative share is above the goal: that is who is drawn.
        drawn = tl.zeros((CANDIDATES,), tl.int64)
        total = tl.sum(none, axis=0)
        for first in range(0, n, COLUMNS):
            points = first + lane
            share = _share(masses, scratch, points, n, i)
            cumulative = total + tl.cumsum(share, axis=0)
            passed = (cumulative[None, :] <= goal[:, None]) & (points[None, :] < n)
            drawn += tl.sum(passed.to(tl.int64), axis=1)
            total += tl.sum(share, axis=0)
        drawn = tl.minimum(drawn, n - 1)

        cost = none
        for first in range(0, n, COLUMNS):
            points = first + lane[None, :]
            inside = points < n
            away = tl.load(distances + drawn[:, None] * n + points, mask=inside, other=0.0)
            if i > 0:
                away = tl.minimum(away, tl.load(scratch + points, mask=inside, other=0.0))
            cost += tl.sum(away * tl.load(masses + points, mask=inside, other=0.0), axis=1)
        cost = tl.where(candidate < candidates, cost, float("inf"))
        best = tl.min(tl.where(cost == tl.min(cost, axis=0), candidate, CANDIDATES), axis=0)
        centre = tl.sum(tl.where(candidate == best, drawn, 0), axis=0)
        tl.store(centres + start * k + i, centre)

        tl.debug_barrier()
        for first in range(0, n, COLUMNS):
            points = first + lane
            left = tl.load(distances + centre * n + points, mask=points < n, other=0.0)
            if i > 0:
                left = tl.minimum(left, tl.load(scratch + points, mask=points < n, other=0.0))
            tl.store(scratch + points, left, mask=points < n)
        tl.debug_barrier()
