"""Allocation: how many neurons every group keeps, so that the whole model meets a budget.

One dendrogram of a group has a partition for every number of clusters k. Its error e(k) is the share of the consumers'
output variance that a ridge regression from the k merged neurons leaves unexplained: `tr(Oᵀ E O) / tr(Oᵀ C O)`, with
outgoing weights O, covariance C of the activations and covariance E of the residuals. Where possible, the resulting
change of the model's outputs is measured (see `nac_gpu.planning.sensitivity`); these losses are added up over the
groups. The search is greedy: it starts from the full widths and repeatedly shrinks the group with the least additional
loss per saved cost, until the budget is met.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nac_gpu.calibration.curves import Curve, loss_at
from nac_gpu.planning.request import Limits
from nac_gpu.tracing.graph import Group

_FAR = 1.2  # ratio of widths with none between them


class Sizes:
    """The cost of a model at other widths, computed from its shapes.

    Args:
        groups: groups whose widths vary.
        shapes: of all parameters, by name.
        operations: FLOPs of one forward pass, by the name of the parameter that is multiplied.
        flops: of the whole pass; operations without a parameter are counted as constant.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        shapes: Mapping[str, torch.Size],
        operations: Mapping[str, int],
        flops: int,
    ) -> None:
        self._before = torch.tensor([group.size for group in groups], dtype=torch.float64)
        fixed = sum(math.prod(shape) for shape in shapes.values())
        rows: dict[tuple[str, int], Tensor] = {}
        for number, group in enumerate(groups):
            for member in group.members:
                if member.tensor in shapes:
                    row = rows.setdefault((member.tensor, member.dim), torch.zeros(len(groups), dtype=torch.float64))
                    row[number] += member.index.shape[1]
        names = list(dict.fromkeys(name for name, _ in rows))
        self._numel = torch.tensor([math.prod(shapes[name]) for name in names], dtype=torch.float64)
        self._flops = torch.tensor([operations.get(name, 0) for name in names], dtype=torch.float64)
        self._fixed = torch.tensor(
            [fixed - float(self._numel.sum()), flops - float(self._flops.sum())], dtype=torch.float64
        )
        deepest = max((sum(1 for other, _ in rows if other == name) for name in names), default=1)
        self._slopes = torch.zeros(deepest, len(names), len(groups), dtype=torch.float64)  # share of a dim per neuron
        place = {name: number for number, name in enumerate(names)}
        depth = dict.fromkeys(names, 0)
        for (name, dim), row in rows.items():
            self._slopes[depth[name], place[name]] = row / shapes[name][dim]
            depth[name] += 1

    def cost(self, widths: Tensor) -> Tensor:
        """Parameters and FLOPs of one pass, float64 [2], for float64 widths [groups]."""
        shares = self._shares(widths)
        return self._of(shares.prod(0))

    def savings(self, widths: Tensor) -> Tensor:
        """Parameters and FLOPs saved by removing one neuron of each group, to first order: float64 [2, groups]."""
        shares = self._shares(widths)
        change = torch.zeros(self._slopes.shape[1:], dtype=torch.float64)
        for depth in range(len(shares)):
            others = shares[[d for d in range(len(shares)) if d != depth]].prod(0)
            change += self._slopes[depth] * others[:, None]
        return torch.stack([self._numel @ change, self._flops @ change])

    def _shares(self, widths: Tensor) -> Tensor:
        """The remaining share of each dimension of each tensor, [dims, tensors]."""
        return 1 - self._slopes @ (self._before - widths)

    def _of(self, shares: Tensor) -> Tensor:
        return self._fixed + torch.stack([self._numel @ shares, self._flops @ shares])


def allocate(losses: Sequence[Curve], limits: Sequence[Limits], sizes: Sizes, most: tuple[float, float]) -> list[int]:
    """Widths within a budget, chosen greedily for the least total loss.

    Args:
        losses: loss of each group, by the number of neurons kept.
        limits: of each group.
        sizes: cost of widths.
        most: budget for parameters and for FLOPs of one pass; infinity for no limit.

    Returns:
        A width for each group; the narrowest ones if even those exceed the budget.
    """
    target = torch.tensor(most, dtype=torch.float64)
    steps = [limit.allowed(_finer(list(curve))) for curve, limit in zip(losses, limits, strict=True)]
    deepest = max(len(widths) for widths in steps)
    widths = torch.full((len(steps), deepest), float("inf"), dtype=torch.float64)  # of each group, ascending
    lost = torch.full_like(widths, float("inf"))
    for group, (curve, own) in enumerate(zip(losses, steps, strict=True)):
        widths[group, : len(own)] = torch.tensor(own, dtype=torch.float64)
        lost[group, : len(own)] = torch.tensor([loss_at(curve, width) for width in own], dtype=torch.float64)
    at = torch.tensor([len(own) - 1 for own in steps])
    now = widths.gather(1, at[:, None])[:, 0]
    cost = sizes.cost(now)
    while bool((cost > target).any()):
        saved = torch.where(cost > target, 1 / cost, 0) @ sizes.savings(now)
        gain = saved[:, None] * (now[:, None] - widths)
        more = (lost - lost.gather(1, at[:, None])).clamp_min(1e-12)
        score = torch.where((widths < now[:, None]) & (gain > 0), more / gain, float("inf"))
        best = int(score.argmin())
        group, step = divmod(best, deepest)
        if not bool(torch.isfinite(score[group, step])):
            break
        wider = int(now[group])
        at[group], now[group] = step, widths[group, step]
        cost = sizes.cost(now)
        if not bool((cost > target).any()):
            now[group] = _widest(sizes, now, group, wider, limits[group].step, target)
            break
    return _filled(sizes, now, limits, losses, target)


def _finer(widths: Sequence[int]) -> list[int]:
    """Widths, with others between those that are far apart: a curve is known at a few, and smooth."""
    known = sorted(widths)
    between = [
        round(low * (high / low) ** (part / parts))
        for low, high in itertools.pairwise(known)
        for parts in [math.ceil(math.log(high / low) / math.log(_FAR))]
        for part in range(1, parts)
    ]
    return sorted({*known, *between})


def _widest(sizes: Sizes, now: Tensor, group: int, wider: int, step: int, target: Tensor) -> int:
    """The largest multiple of the step below `wider` that meets the budget; the other groups stay fixed."""
    low, high = int(now[group]), wider
    while _next(low, step) < high:
        middle = max((low + (high - low) // 2) // step * step, _next(low, step))
        trial = now.clone()
        trial[group] = middle
        if bool((sizes.cost(trial) > target).any()):
            high = middle
        else:
            low = middle
    return low


def _next(width: int, step: int) -> int:
    """The smallest multiple of the step above a width; the width itself may be a limit, and no multiple."""
    return (width // step + 1) * step


def _filled(sizes: Sizes, now: Tensor, limits: Sequence[Limits], losses: Sequence[Curve], target: Tensor) -> list[int]:
    """Spend the rest of the budget: groups grow by one step if they can, in order of loss per cost."""
    order = sorted(
        range(len(limits)),
        key=lambda g: -loss_at(losses[g], int(now[g])) / max(1e-12, float(sizes.savings(now)[:, g].sum())),
    )
    for group in order:
        grown = now.clone()
        grown[group] = min(limits[group].most, _next(int(now[group]), limits[group].step))
        if grown[group] > now[group] and bool((sizes.cost(grown) <= target).all()):
            now = grown
    return [int(width) for width in now]
