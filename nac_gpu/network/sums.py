"""Sums over the rows of a cluster, reproducible bit for bit on every device."""

from torch import Tensor


def add_rows(total: Tensor, dim: int, index: Tensor, parts: Tensor) -> Tensor:
    """`total.index_add_(dim, index, parts)` in place, but with a fixed order of summation on CUDA too.

    Args:
        total: the tensor to add to.
        dim: the dimension along which `index` counts.
        index: int64 [m], the position in `total` that each part is added to, on the same device.
        parts: same shape as `total`, except for size m along `dim`.

    Returns:
        `total`.
    """
    if total.is_cuda:
        return _in_order(total, dim, index, parts)
    single = tuple(d for d in range(total.ndim) if total.shape[d] == 1 and d != dim)  # slow on the CPU
    total.squeeze(single).index_add_(dim - sum(d < dim for d in single), index, parts.squeeze(single))
    return total


def _in_order(total: Tensor, dim: int, index: Tensor, parts: Tensor) -> Tensor:
    """Add with index_put_, which sorts first on CUDA; index_add_ uses atomic additions in arbitrary order there."""
    total.movedim(dim, 0).index_put_((index,), parts.movedim(dim, 0), accumulate=True)
    return total
