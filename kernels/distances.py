"""All pairwise squared distances, or Ward's cost of merging every pair, as symmetric matrices."""

from __future__ import annotations  # without Triton there is no tl.constexpr

import torch
from torch import Tensor

from . import products as tiles
from .backend import jit, launch, tl, triton, uses_triton
from .batch import Batch
from .products import TILE, close_share, pad_points, tile_of_products

# Beyond this share of close pairs in a block, all its differences are cheaper than those of single pairs.
_MANY_CLOSE = 0.05
# Elements of one block of work on a CPU: 2 MiB of float64, what the cache of one core holds.
_BLOCK_ELEMENTS = 2**18
# Fewer rows than this starve the matrix product.
_BLOCK_MIN_ROWS = 128
# Rows of a panel on a GPU. What lies above the diagonal of a panel is computed and not used.
_PANEL_ROWS = 1024
# In a tile with more close pairs than this, all differences are cheaper than those of one pair after the other.
_FEW_PAIRS = 64
# Dimensions of one pair's difference at a time.
_PAIR_DEPTH = 256


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
    points, norms, padded = pad_points(points, batch)
    costs = points.new_empty(sum(n * n for n, _ in batch.shapes))
    panels = tiles.products(points) == "panels"
    if panels:
        for part, matrix in zip(padded.points(points), batch.costs(costs), strict=True):
            _write_products(matrix, part)
    count = triton.cdiv(batch.largest, TILE)
    close = torch.zeros(len(batch) * count * count, dtype=torch.int32, device=points.device)
    masses_or_any = norms if masses is None else masses
    options = {"TILE": TILE, "num_warps": tiles.WARPS, "enable_fp_fusion": True, "WEIGHTED": masses is not None}
    launch(
        _distances_kernel,
        (count, count, len(batch)),
        points,
        norms,
        masses_or_any,
        padded.table,
        costs,
        close,
        PANELS=panels,
        CLOSE=close_share(points.dtype),
        LARGEST=torch.finfo(costs.dtype).max,
        DEPTH=tiles.DEPTH,
        num_stages=tiles.STAGES,
        **options,
    )
    launch(
        _close_kernel,
        (count, count, len(batch)),
        points,
        masses_or_any,
        padded.table,
        costs,
        close,
        FEW=_FEW_PAIRS,
        DEPTH=_PAIR_DEPTH,
        **options,
    )
    return costs


def _write_products(costs: Tensor, points: Tensor) -> None:
    """Inner products of all points on and below the diagonal of a matrix, on a GPU; above it anything."""
    for start in range(0, len(points), _PANEL_ROWS):
        stop = min(start + _PANEL_ROWS, len(points))
        torch.mm(points[start:stop], points[:stop].T, out=costs[start:stop, :stop])


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
def _distances_kernel(
    points,
    norms,
    masses,
    table,
    costs,
    has_close,
    TILE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PANELS: tl.constexpr,
    CLOSE: tl.constexpr,
    LARGEST: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A program a tile of the lower half of a problem's matrix; it writes the mirrored tile as well.

    Close pairs get -1, and their tile a mark.
    """
    problem = table + tl.program_id(2) * 5
    n = tl.load(problem)
    row_tile = tl.program_id(1).to(tl.int64)
    column_tile = tl.program_id(0).to(tl.int64)
    if (column_tile > row_tile) | (row_tile * TILE >= n):
        return
    d = tl.multiple_of(tl.load(problem + 1), DEPTH)
    points += tl.multiple_of(tl.load(problem + 2), DEPTH)
    norms += tl.load(problem + 3)
    masses += tl.load(problem + 3)
    costs += tl.load(problem + 4)
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    row_inside = rows < n
    column_inside = columns < n
    lower = costs + rows[:, None] * n + columns[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    if PANELS:
        product = tl.load(lower, mask=inside, other=0.0)
    else:
        product = tile_of_products(points, rows, columns, row_inside, column_inside, d, TILE, DEPTH)
    scale = tl.load(norms + rows, mask=row_inside, other=0.0)[:, None]
    scale += tl.load(norms + columns, mask=column_inside, other=0.0)[None, :]
    block = scale - 2 * product
    below = inside & (rows[:, None] > columns[None, :])
    close = (block < CLOSE * scale) & below
    mark = (tl.program_id(2) * tl.num_programs(1) + row_tile) * tl.num_programs(0) + column_tile
    tl.store(has_close + mark + tl.zeros((TILE, TILE), tl.int64), 1, mask=close)
    if WEIGHTED:
        block *= tile_of_reduced_masses(masses, rows, columns, row_inside, column_inside)
    block = tl.where(close, -1.0, block)
    block = tl.where(rows[:, None] == columns[None, :], LARGEST, block)
    tl.store(lower, block, mask=below | (inside & (rows[:, None] == columns[None, :])))
    tl.store(costs + columns[None, :] * n + rows[:, None], block, mask=below)


@jit
def _close_kernel(
    points,
    masses,
    table,
    costs,
    has_close,
    TILE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FEW: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A program a tile, for the pairs that `_distances_kernel` left: their costs from differences."""
    problem = table + tl.program_id(2) * 5
    n = tl.load(problem)
    row_tile = tl.program_id(1).to(tl.int64)
    column_tile = tl.program_id(0).to(tl.int64)
    mark = (tl.program_id(2) * tl.num_programs(1) + row_tile) * tl.num_programs(0) + column_tile
    if tl.load(has_close + mark) == 0:
        return
    points += tl.load(problem + 2)
    masses += tl.load(problem + 3)
    costs += tl.load(problem + 4)
    rows = row_tile * TILE + tl.arange(0, TILE)
    columns = column_tile * TILE + tl.arange(0, TILE)
    below = (rows[:, None] < n) & (columns[None, :] < n) & (rows[:, None] > columns[None, :])
    lower = costs + rows[:, None] * n + columns[None, :]
    close = tl.load(lower, mask=below, other=0.0) < 0
    block = tl.zeros((TILE, TILE), costs.dtype.element_ty)
    block = _exact_where_close(block, close, points, rows, columns, tl.load(problem + 1), FEW, DEPTH)
    if WEIGHTED:
        block *= tile_of_reduced_masses(masses, rows, columns, rows < n, columns < n)
    tl.store(lower, block, mask=close)
    tl.store(costs + columns[None, :] * n + rows[:, None], block, mask=close)


@jit
def _exact_where_close(block, close, points, rows, columns, d, FEW: tl.constexpr, DEPTH: tl.constexpr):
    """Squared distances `block` [TILE, TILE] of points `rows` to points `columns`, the close ones made of differences.

    Few close pairs are computed one after the other, many all at once; then the whole tile is.
    """
    dtype = points.dtype.element_ty
    TILE: tl.constexpr = block.shape[0]
    count = tl.sum(tl.sum(close.to(tl.int32), axis=1), axis=0)
    if count > FEW:  # pyright: ignore[reportOperatorIssue]
        some_row = tl.max(close.to(tl.int32), axis=1) > 0  # pyright: ignore[reportOperatorIssue]
        some_column = tl.max(close.to(tl.int32), axis=0) > 0  # pyright: ignore[reportOperatorIssue]
        exact = tl.zeros((TILE, TILE), dtype)
        for k in range(0, d):
            row = tl.load(points + rows * d + k, mask=some_row, other=0.0)
            column = tl.load(points + columns * d + k, mask=some_column, other=0.0)
            difference = row[:, None] - column[None, :]
            exact += difference * difference
        block = tl.where(close, exact, block)
    else:
        lane = tl.arange(0, TILE)
        place = lane[:, None] * TILE + lane[None, :]
        depth = tl.arange(0, DEPTH)
        while count > 0:  # pyright: ignore[reportOperatorIssue]
            first = tl.min(tl.min(tl.where(close, place, TILE * TILE), axis=1), axis=0)
            row = points + tl.sum(tl.where(lane == first // TILE, rows, 0), axis=0) * d
            own_column = lane == first % TILE  # pyright: ignore[reportOperatorIssue]
            column = points + tl.sum(tl.where(own_column, columns, 0), axis=0) * d
            total = tl.zeros((DEPTH,), dtype)
            for start in range(0, d, DEPTH):
                inside = start + depth < d
                difference = tl.load(row + start + depth, mask=inside, other=0.0)
                difference -= tl.load(column + start + depth, mask=inside, other=0.0)
                total += difference * difference
            block = tl.where(place == first, tl.sum(total, axis=0), block)
            close = close & (place != first)
            count -= 1  # pyright: ignore[reportOperatorIssue]
    return block


@jit
def tile_of_reduced_masses(masses, rows, columns, row_inside, column_inside):
    """As `reduced_masses`, of all pairs; outside anything."""
    one = tl.load(masses + rows, mask=row_inside, other=1.0)[:, None]
    other = tl.load(masses + columns, mask=column_inside, other=1.0)[None, :]
    return other / (one + other) * one
