"""All pairwise squared distances, or Ward's cost of merging every pair, as symmetric matrices."""

from __future__ import annotations  # without Triton there is no tl.constexpr

import torch
from torch import Tensor

from .backend import jit, tl, triton, uses_triton
from .batch import Batch

# A product loses the digits that two points share: |x|² + |y|² - 2 x·y carries an absolute error of some units in the
# last place of |x|². Pairs closer than this share of |x|² + |y|² are computed again from their difference, which leaves
# a relative error near 1e-12 in float64 and 1e-5 in float32, and makes the distance between copies exactly zero.
_CLOSE = {torch.float64: 5e-4, torch.float32: 3e-2}
# Beyond this share of close pairs in a block, all its differences are cheaper than those of single pairs.
_MANY_CLOSE = 0.05
# Elements of one block of work on a CPU: 2 MiB of float64, what the cache of one core holds.
_BLOCK_ELEMENTS = 2**18
# Fewer rows than this starve the matrix product.
_BLOCK_MIN_ROWS = 128
# Sides of a Triton program's tile, and the dimensions it multiplies at a time.
TILE = 64
TILE_DEPTH = 16
TILE_WARPS = 8
TILE_STAGES = 3


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
    n, d = points.shape
    batch = Batch.of([(n, d)], points.device)
    return squared_distances_batch(points.contiguous().view(-1), masses, batch).view(n, n)


def squared_distances_batch(points: Tensor, masses: Tensor | None, batch: Batch) -> Tensor:
    """`squared_distances` of many problems at once.

    Args:
        points: the points of all problems, flat.
        masses: those of all problems, flat, or None.
        batch: where each problem lies.

    Returns:
        The matrices of all problems, flat.
    """
    if not uses_triton(points):
        return squared_distances_batch_torch(points, masses, batch)
    costs = points.new_empty(sum(n * n for n, _ in batch.shapes))
    tiles = triton.cdiv(batch.largest, TILE)
    _distances_kernel[(tiles, tiles, len(batch))](
        points,
        points if masses is None else masses,
        batch.table,
        costs,
        WEIGHTED=masses is not None,
        CLOSE=close_share(points.dtype),
        LARGEST=torch.finfo(costs.dtype).max,
        TILE=TILE,
        DEPTH=TILE_DEPTH,
        num_warps=TILE_WARPS,
        num_stages=TILE_STAGES,
        enable_fp_fusion=True,
    )
    return costs


def squared_distances_batch_torch(points: Tensor, masses: Tensor | None, batch: Batch) -> Tensor:
    """The plain PyTorch twin of `squared_distances_batch`."""
    costs = points.new_empty(sum(n * n for n, _ in batch.shapes))
    masses_of = [None] * len(batch) if masses is None else batch.slots(masses)
    for part, mass, matrix in zip(batch.points(points), masses_of, batch.costs(costs), strict=True):
        _fill(matrix, part, mass)
    return costs


def _fill(costs: Tensor, points: Tensor, masses: Tensor | None) -> None:
    """Write one matrix: blocks of rows of the lower half, each mirrored at once."""
    n = len(points)
    norms = points.square().sum(dim=1)
    # The product wants many rows, the passes over the block want it to stay in the cache.
    step = max(_BLOCK_MIN_ROWS, _BLOCK_ELEMENTS // n)
    memory = points.new_empty(min(step, n) * n)
    for start in range(0, n, step):
        stop = min(start + step, n)
        own = torch.arange(start, stop, device=points.device)
        block = memory[: (stop - start) * stop].view(stop - start, stop)
        _block_of_distances(block, points[:stop], norms[:stop], own)
        if masses is not None:
            block *= reduced_masses(masses[start:stop, None], masses[:stop])
        _mirror_block(costs, block, start, stop)
    costs.fill_diagonal_(torch.finfo(costs.dtype).max)


def _block_of_distances(block: Tensor, points: Tensor, norms: Tensor, rows: Tensor) -> None:
    """Squared distances of some points to all, in plain PyTorch; infinity to themselves.

    Args:
        block: [r, n], written. Memory that is not new need not be mapped, which takes as long as the product.
        points: [n, d].
        norms: [n], their squared lengths.
        rows: int64 [r], which points.
    """
    own = points[rows]
    torch.addmm(norms, own, points.T, alpha=-2, out=block)
    block += norms[rows, None]
    block.scatter_(1, rows[:, None], torch.inf)
    # A close pair has nearly equal norms, so the norm of one of the two is enough to find it.
    near_rows, columns = (block < 2 * close_share(block.dtype) * norms[rows, None]).nonzero(as_tuple=True)
    if len(near_rows) > _MANY_CLOSE * block.numel():
        block.copy_(torch.cdist(own, points, compute_mode="donot_use_mm_for_euclid_dist").square_())
        block.scatter_(1, rows[:, None], torch.inf)
        return
    step = max(1, _BLOCK_ELEMENTS // points.shape[1])
    for row, column in zip(near_rows.split(step), columns.split(step), strict=True):
        block[row, column] = (own[row] - points[column]).square_().sum(dim=1)


def close_share(dtype: torch.dtype) -> float:
    """The share of |x|² + |y|² below which a squared distance is not taken from a product."""
    return _CLOSE[dtype]


def reduced_masses(one: Tensor, other: Tensor) -> Tensor:
    """`m_i m_j / (m_i + m_j)`, broadcast, in an order that neither overflows nor underflows early."""
    return other / (one + other) * one


def _mirror_block(costs: Tensor, block: Tensor, start: int, stop: int) -> None:
    """Write rows start:stop of the lower half of a symmetric matrix, and the same numbers into its upper half."""
    square = block[:, start:]  # on the diagonal: only its lower half counts
    square.tril_(-1)
    square += square.T.clone()
    costs[start:stop, :stop] = block
    costs[:start, start:stop] = block[:, :start].T


@jit
def tile_of_distances(points, rows, columns, n, d, CLOSE: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """Squared distances [TILE, TILE] of points `rows` to points `columns`, int64 [TILE] each; n and more mean none.

    Norms and a product; then, if any pair is close, its differences.
    """
    dtype = points.dtype.element_ty
    row_points = points + rows * d
    column_points = points + columns * d
    row_inside = rows < n
    column_inside = columns < n
    depth = tl.arange(0, DEPTH)
    product = tl.zeros((TILE, TILE), dtype)
    row_norms = tl.zeros((TILE,), dtype)
    column_norms = tl.zeros((TILE,), dtype)
    for start in range(0, d, DEPTH):
        within = start + depth < d
        left = tl.load(
            row_points[:, None] + (start + depth)[None, :], mask=row_inside[:, None] & within[None, :], other=0.0
        )
        right = tl.load(
            column_points[None, :] + (start + depth)[:, None],
            mask=column_inside[None, :] & within[:, None],
            other=0.0,
        )
        product = tl.dot(left, right, product, input_precision="ieee", out_dtype=dtype)
        row_norms += tl.sum(left * left, axis=1)
        column_norms += tl.sum(right * right, axis=0)
    scale = row_norms[:, None] + column_norms[None, :]
    block = scale - 2 * product
    close = (block < CLOSE * scale) & (rows[:, None] != columns[None, :]) & row_inside[:, None] & column_inside[None, :]
    if tl.max(tl.max(close.to(tl.int32), axis=1), axis=0) > 0:  # pyright: ignore[reportOperatorIssue]
        exact = tl.zeros((TILE, TILE), dtype)
        for k in range(0, d):
            row = tl.load(row_points + k, mask=row_inside, other=0.0)
            column = tl.load(column_points + k, mask=column_inside, other=0.0)
            difference = row[:, None] - column[None, :]
            exact += difference * difference
        block = tl.where(close, exact, block)
    return block


@jit
def _distances_kernel(
    points,
    masses,
    table,
    costs,
    WEIGHTED: tl.constexpr,
    CLOSE: tl.constexpr,
    LARGEST: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A program a tile of the lower half of a problem's matrix; it writes the mirrored tile as well."""
    problem = table + tl.program_id(2) * 5
    n = tl.load(problem)
    d = tl.load(problem + 1)
    row_tile = tl.program_id(1).to(tl.int64)
    column_tile = tl.program_id(0).to(tl.int64)
    if (column_tile > row_tile) | (row_tile * TILE >= n):
        return
    points += tl.load(problem + 2)
    masses += tl.load(problem + 3)
    costs += tl.load(problem + 4)
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    block = tile_of_distances(points, rows, columns, n, d, CLOSE, TILE, DEPTH)
    if WEIGHTED:
        row_mass = tl.load(masses + rows, mask=rows < n, other=1.0)[:, None]
        column_mass = tl.load(masses + columns, mask=columns < n, other=1.0)[None, :]
        block *= column_mass / (row_mass + column_mass) * row_mass
    if row_tile == column_tile:
        block = tl.where(rows[:, None] > columns[None, :], block, tl.trans(block))
        block = tl.where(rows[:, None] == columns[None, :], LARGEST, block)
    inside = (rows[:, None] < n) & (columns[None, :] < n)
    tl.store(costs + rows[:, None] * n + columns[None, :], block, mask=inside)
    if row_tile != column_tile:
        tl.store(costs + columns[:, None] * n + rows[None, :], tl.trans(block), mask=tl.trans(inside))
