"""All pairwise squared distances, or Ward's cost of merging every pair, as one symmetric matrix."""

import torch
from torch import Tensor

# Up to this many dimensions, differences are cheaper than a matrix product and exact.
_DIRECT_DIMENSIONS = 16
# A product loses the digits that two points share: |x|² + |y|² - 2 x·y carries an absolute error of about 1e-15 |x|².
# Pairs closer than this share of |x|² are computed again from their difference, which leaves a relative error
# near 1e-12 and makes the distance between copies exactly zero.
_CLOSE = 1e-3
# Elements of one block of work: 2 MiB of float64, what the cache of one core holds.
_BLOCK_ELEMENTS = 2**18
# Fewer rows than this starve the matrix product.
_BLOCK_MIN_ROWS = 128


def squared_distances(points: Tensor, masses: Tensor | None = None) -> Tensor:
    """Squared Euclidean distances between all points, weighted as Ward's costs where masses are given.

    With masses the entry is the increase of the within-cluster sum of squares when i and j merge,
    `m_i m_j / (m_i + m_j) * |x_i - x_j|²`.

    Args:
        points: [n, d], floating, centred. Points with a common offset are all close next to their norms, and close
            pairs are computed one by one: right, but slow.
        masses: [n], positive, of the dtype of the points; None for plain squared distances.

    Returns:
        [n, n] of the dtype of the points, symmetric bit for bit (one half is computed and mirrored), never
        negative. The diagonal holds the dtype's largest finite number, so that no point is its own neighbour.
    """
    return squared_distances_torch(points, masses)


def squared_distances_torch(points: Tensor, masses: Tensor | None = None) -> Tensor:
    """The plain PyTorch twin of `squared_distances`: blocks of rows of the lower half, each mirrored at once."""
    n, d = points.shape
    norms = points.square().sum(dim=1)  # [n]
    costs = points.new_empty(n, n)
    # The product wants many rows, the passes over the block want it to stay in the cache.
    step = max(_BLOCK_MIN_ROWS, _BLOCK_ELEMENTS // n)
    for start in range(0, n, step):
        stop = min(start + step, n)
        if d <= _DIRECT_DIMENSIONS:
            block = _block_by_differences(points, start, stop)
        else:
            block = _block_by_product(points, norms, start, stop)
        if masses is not None:
            block *= _reduced_masses(masses, start, stop)
        _mirror_block(costs, block, start, stop)
    return costs.fill_diagonal_(torch.finfo(costs.dtype).max)


def _block_by_differences(points: Tensor, start: int, stop: int) -> Tensor:
    """Squared distances [stop - start, stop] of rows start:stop to rows :stop, without a matrix product."""
    return torch.cdist(points[start:stop], points[:stop], compute_mode="donot_use_mm_for_euclid_dist").square_()


def _block_by_product(points: Tensor, norms: Tensor, start: int, stop: int) -> Tensor:
    """Squared distances [stop - start, stop] of rows start:stop to rows :stop, close pairs from their differences."""
    block = torch.addmm(norms[:stop], points[start:stop], points[:stop].T, alpha=-2)
    block += norms[start:stop, None]
    # A close pair has nearly equal norms, so the norm of one of the two is enough to find it.
    close = block < _CLOSE * norms[start:stop, None]
    close[:, start:].fill_diagonal_(False)
    rows, columns = close.nonzero(as_tuple=True)
    step = max(1, _BLOCK_ELEMENTS // points.shape[1])
    for row, column in zip(rows.split(step), columns.split(step), strict=True):
        block[row, column] = (points[row + start] - points[column]).square_().sum(dim=1)
    return block


def _reduced_masses(masses: Tensor, start: int, stop: int) -> Tensor:
    """`m_i m_j / (m_i + m_j)` [stop - start, stop], in an order that neither overflows nor underflows early."""
    rows, columns = masses[start:stop, None], masses[:stop]
    return columns / (rows + columns) * rows


def _mirror_block(costs: Tensor, block: Tensor, start: int, stop: int) -> None:
    """Write rows start:stop of the lower half of a symmetric matrix, and the same numbers into its upper half."""
    square = block[:, start:]  # on the diagonal: only its lower half counts
    square.tril_(-1)
    square += square.T.clone()
    costs[start:stop, :stop] = block
    costs[:start, start:stop] = block[:, :start].T
