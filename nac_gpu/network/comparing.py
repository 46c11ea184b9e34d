"""Measures of how much the outputs of two networks differ."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nac_gpu.network.precision import floating, without_tf32
from nac_gpu.network.reaching import leaves_in
from nac_gpu.network.running import ExampleInputs, call, evaluating, in_small_operations


def outputs(model: nn.Module, example_inputs: ExampleInputs, *, auxiliary: bool = False) -> list[Tensor]:
    """All outputs of the model in eval mode, with those of auxiliary heads if `auxiliary` is set.

    These are all tensors that can be reached from what it returns; arrays and numbers become tensors. They are to be
    compared, so TF32 is off: its rounding would look like a difference.
    """
    with evaluating(model, auxiliary=auxiliary), in_small_operations(model), without_tf32():
        found = list(leaves_in(call(model, example_inputs)))
    return [leaf if isinstance(leaf, Tensor) else torch.as_tensor(leaf) for leaf in found if _has_numbers(leaf)]


def _has_numbers(leaf: Any) -> bool:
    return not isinstance(leaf, np.ndarray) or leaf.dtype.kind in "bifc"


def tells(value: Tensor) -> bool:
    """Whether a tensor has a finite real or complex value, so that comparing it with another one says something."""
    return (value.is_floating_point() or value.is_complex()) and bool(value.isfinite().any())


def parts(tensor: Tensor) -> Tensor:
    """The real and imaginary parts of a complex tensor, along a new last dimension; any other tensor as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference over several tensors, each relative to its own largest finite value.

    Complex tensors are compared by their real and imaginary parts, and integers are not compared.

    The difference is 0 where both have the same infinity or both have NaN, infinite where only one has it, and
    infinite for another number of tensors and for tensors of different shapes.
    """
    worst = math.inf if len(found) != len(expected) else 0.0
    for a, b in zip(found, expected, strict=False):
        if a.shape != b.shape:
            return math.inf
        a, b = parts(a), parts(b)
        if not b.numel() or not b.is_floating_point():
            continue
        same = (a == b) | (a.isnan() & b.isnan())
        error = float((a - b).masked_fill(same, 0).abs().max()) / (float(b.nan_to_num(0, 0, 0).abs().max()) or 1.0)
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def change(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor | None:
    """How much outputs changed: the mean squared difference divided by the variance, averaged over the outputs.

    An output that is constant along the batch is divided by its mean square. The host does not wait for the device.

    Args:
        found: the outputs. Those that are neither floating nor complex, have another shape than expected, or are
            expected to be all zero are ignored.
        expected: the original outputs.

    Returns:
        A scalar; -1, without a gradient, if all comparable outputs are expected to be zero; None if no output is
        comparable.
    """
    if len(found) != len(expected):
        return None
    shares, counts = [], []
    for now, then in zip(found, expected, strict=True):
        now, then = parts(now), parts(then)
        if now.shape == then.shape and now.is_floating_point() and now.numel():
            now, then = floating(now), floating(then)
            whole = (then - then.mean(0)).square().mean()
            whole = torch.where(whole == 0, then.square().mean(), whole)
            some = whole > 0
            shares.append(torch.where(some, (now - then).square().mean() / torch.where(some, whole, 1), 0))
            counts.append(some)
    if not shares:
        return None
    count = torch.stack(counts).sum()
    return torch.where(count > 0, torch.stack(shares).sum() / count.clamp(min=1), -1)


def mean_change(changes: Iterable[Tensor | None]) -> float | None:
    """The mean of the results of `change` that are known; None if there are none, or if the mean is not finite."""
    shares = [float(share) for share in changes if share is not None]
    known = [share for share in shares if share != -1]
    mean = sum(known) / len(known) if known else None
    return mean if mean is not None and math.isfinite(mean) else None
