"""How far the outputs of two networks are apart."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from nac_gpu.network.precision import floating, without_tf32
from nac_gpu.network.running import ExampleInputs, call, evaluating, in_small_operations, tensors_in


def outputs(model: nn.Module, example_inputs: ExampleInputs, *, auxiliary: bool = False) -> list[Tensor]:
    """All tensors that the model returns in eval mode, with what auxiliary heads return if asked for.

    They are to be compared, so CUDA does not round products to TF32.
    """
    with evaluating(model, auxiliary=auxiliary), in_small_operations(model), without_tf32():
        return list(tensors_in(call(model, example_inputs)))


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error over several tensors, each against its own largest value."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if b.numel() and b.is_floating_point():
            scale = float(b.abs().max()) or 1.0
            worst = max(worst, float((a - b).abs().max()) / scale)
    return worst


def change(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor | None:
    """How much outputs changed: the squared difference as a share of the variance, the mean over the outputs.

    The host does not wait for the device.

    Args:
        found: the outputs; those that are not floating, have another shape than expected, or should not vary, do not
            count.
        expected: what they were.

    Returns:
        A scalar: -1, without a gradient, where all outputs that could count should be zero; None if there are none.
    """
    if len(found) != len(expected):
        return None
    shares, counts = [], []
    for now, then in zip(found, expected, strict=True):
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
    """The mean of those that are known; None if there are none, or it is not finite."""
    shares = [float(share) for share in changes if share is not None]
    known = [share for share in shares if share != -1]
    mean = sum(known) / len(known) if known else None
    return mean if mean is not None and math.isfinite(mean) else None
