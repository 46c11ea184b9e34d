"""Sums over the rows of a cluster, the same bits run after run on every device."""

from torch import Tensor


def add_rows(total: Tensor, dim: int, index: Tensor, parts: Tensor) -> Tensor:
    """`total.index_add_(dim, index, parts)`, in place, whose order of summing is fixed on CUDA too.

    Args:
        total: what is added to.
        dim: along which dimension.
        index: int64 [m], the position in `total` that each part is added to, on its device.
        parts: of the shape of `total`, but m along `dim`.

    Returns:
        `total`.
    """
    return _in_order(total, dim, index, parts) if total.is_cuda else total.index_add_(dim, index, parts)


def _in_order(total: Tensor, dim: int, index: Tensor, parts: Tensor) -> Tensor:
    """CUDA's index_add_ adds atomically, in whatever order; index_put_ sorts first."""
    total.movedim(dim, 0).index_put_((index,), parts.movedim(dim, 0), accumulate=True)
    return total
