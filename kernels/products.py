"""Tiles of pairwise squared distances: a product, and differences where two points are so close that it has no digits.

Points are padded with zeros to a multiple of `DEPTH` dimensions, so that products need no mask, and their norms are
made before. The product of a tile is made by the program that needs it ("tiles"), or for many tiles at once by torch.mm
("panels"), which calls cuBLAS on a GPU.
"""

from __future__ import annotations  # without Triton there is no tl.constexpr

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from .backend import jit, launch, on_device, tl, triton, uses_triton
from .batch import Batch

# A product loses the digits that two points share: |x|² + |y|² - 2 x·y carries an absolute error of some units in the
# last place of |x|². Pairs closer than this share of |x|² + |y|² are computed again from their difference, which leaves
# a relative error near 1e-12 in float64 and 1e-5 in float32, and makes the distance between copies exactly zero.
_CLOSE = {torch.float64: 5e-4, torch.float32: 3e-2}
#: Sides of a Triton program's tile, and the dimensions it multiplies at a time: the largest without spilled registers.
TILE = 64
DEPTH = 16
WARPS = 8
STAGES = 3
# Rows and dimensions that a program pads at a time.
_PAD_ROWS = 4
_PAD_COLUMNS = 256

Way = Literal["tiles", "panels"]
_chosen: Way | None = None


def close_share(dtype: torch.dtype) -> float:
    """The share of |x|² + |y|² below which a squared distance is not taken from a product."""
    return _CLOSE[dtype]


def padded_width(d: int) -> int:
    """The least multiple of `DEPTH` that is not below d."""
    return -(-d // DEPTH) * DEPTH


@contextlib.contextmanager
def use_products(way: Way | None) -> Iterator[None]:
    """Within the context products are made in this way; None leaves it to `products`. For tests and benchmarks."""
    global _chosen
    before, _chosen = _chosen, way
    try:
        yield
    finally:
        _chosen = before


def products(points: Tensor) -> Way:
    """Who makes the products of points where Triton's kernels are used.

    In float32 the tiles: their products keep all digits, whatever the user allows cuBLAS to round. In float64 the tiles
    where Triton uses the matrix instruction that runs at the full rate: 8 x 8 x 4 on Ampere, 16 x 8 x 16 on Hopper.
    Triton 3.5 to 3.7 do; 3.4 has no float64 product, 3.8 and 3.9 use 8 x 8 x 4 on Hopper, at a third of the rate.
    """
    if _chosen is not None:
        return _chosen
    if points.dtype != torch.float64 or not points.is_cuda:
        return "tiles"
    return _products_in_float64(points.device)


@cache
def _products_in_float64(device: torch.device) -> Way:
    x = torch.zeros(DEPTH, DEPTH, dtype=torch.float64, device=device)
    with on_device(x):
        target: Any = triton.runtime.driver.active.get_current_target()
        try:
            compiled = _product_kernel.warmup(x, x, SIDE=DEPTH, grid=(1,), num_warps=1, enable_fp_fusion=True)
        except triton.CompilationError:
            return "panels"
    if target.backend != "cuda":
        return "tiles"
    full_rate = "m16n8k16" if target.arch >= 90 else "m8n8k4"
    return "tiles" if full_rate in compiled.asm["ptx"] else "panels"


def pad_points(points: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Batch]:
    """Points with zeros behind their dimensions, up to a multiple of `DEPTH`, and their squared norms.

    Args:
        points: the points of all problems, flat.
        batch: where each problem lies.

    Returns:
        The padded points, flat (the given ones where nothing is to be padded); the squared norm of every point, flat;
        and where each problem lies now.
    """
    padded = Batch.of([(n, padded_width(d)) for n, d in batch.shapes], points.device)
    if not uses_triton(points):
        return *pad_points_torch(points, batch), padded
    copies = padded.shapes != batch.shapes
    wide = points.new_empty(sum(n * d for n, d in padded.shapes)) if copies else points
    norms = points.new_empty(sum(n for n, _ in batch.shapes))
    grid = (triton.cdiv(batch.largest, _PAD_ROWS), len(batch))
    launch(
        _pad_kernel,
        grid,
        points,
        wide,
        norms,
        batch.table,
        padded.table,
        COPIES=copies,
        ROWS=_PAD_ROWS,
        COLUMNS=_PAD_COLUMNS,
        enable_fp_fusion=True,
    )
    return wide, norms, padded


def pad_points_torch(points: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The plain PyTorch twin of `pad_points`, without the batch."""
    parts = batch.points(points)
    wide = [torch.nn.functional.pad(part, (0, padded_width(part.shape[1]) - part.shape[1])) for part in parts]
    return torch.cat([part.flatten() for part in wide]), torch.cat([part.square().sum(dim=1) for part in parts])


@jit
def _pad_kernel(
    points, wide, norms, table, padded_table, COPIES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A program some points of a problem."""
    problem = table + tl.program_id(1) * 5
    n = tl.load(problem)
    d = tl.load(problem + 1)
    first = tl.program_id(0) * ROWS
    if first >= n:
        return
    rows = first.to(tl.int64) + tl.arange(0, ROWS)
    padded_problem = padded_table + tl.program_id(1) * 5
    wide_d = tl.load(padded_problem + 1)
    source = points + tl.load(problem + 2) + rows[:, None] * d
    target = wide + tl.load(padded_problem + 2) + rows[:, None] * wide_d
    norm = tl.zeros((ROWS, COLUMNS), points.dtype.element_ty)
    for start in range(0, wide_d, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)[None, :]
        values = tl.load(source + columns, mask=(rows[:, None] < n) & (columns < d), other=0.0)
        norm += values * values
        if COPIES:
            tl.store(target + columns, values, mask=(rows[:, None] < n) & (columns < wide_d))
    tl.store(norms + tl.load(problem + 3) + rows, tl.sum(norm, axis=1), mask=rows < n)


@jit
def _product_kernel(points, costs, SIDE: tl.constexpr):
    """One product, by which `products` sees what Triton makes of it."""
    at = tl.arange(0, SIDE)
    places = at[:, None] * SIDE + at[None, :]
    result = tl.dot(tl.load(points + places), tl.load(points + places), input_precision="ieee", out_dtype=tl.float64)
    tl.store(costs + places, result)


@jit
def tile_of_products(points, rows, columns, row_inside, column_inside, d, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """Inner products [TILE, TILE] of points `rows` with points `columns`, int64 [TILE] each; outside anything."""
    depth = tl.arange(0, DEPTH)
    left = points + tl.where(row_inside, rows, 0)[:, None] * d + depth[None, :]
    right = points + tl.where(column_inside, columns, 0)[None, :] * d + depth[:, None]
    dtype = points.dtype.element_ty
    product = tl.zeros((TILE, TILE), dtype)
    for _ in range(0, d, DEPTH):
        product = tl.dot(tl.load(left), tl.load(right), product, input_precision="ieee", out_dtype=dtype)
        left += DEPTH
        right += DEPTH
    return product
