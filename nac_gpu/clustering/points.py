"""Checks of points and weights, and the scaling that every clustering method applies to them first."""

from collections.abc import Sequence

import torch
from torch import Tensor


def standardise(
    points: Tensor, weights: Tensor | None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Check, centre and scale the points and weights of one problem: see `standardise_batch`.

    Returns:
        New points [n, d]; new masses [n]; and the factor that converts heights back to the original unit, [].
    """
    flat, masses, units = standardise_batch([points], [weights], dtype)
    return flat.view(points.shape), masses, units[0]


def standardise_batch(
    points: Sequence[Tensor], weights: Sequence[Tensor | None], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the points and weights of several problems, then centre and scale them.

    Points are centred, because a common offset cancels digits in matrix products. Points and masses are scaled to
    about 1, because squares of 1e-200 underflow and squares of 1e200 overflow. The scales are powers of two, so scaling
    does not round. The host waits for the device once.

    Args:
        points: as for `ward_linkage`, at least one problem.
        weights: as for `ward_linkage`, one or None for every problem.
        dtype: of the result.

    Returns:
        The points of all problems, flat; their masses, flat; and for each problem the factor that converts a height
        (the square root of a mass times a squared distance) back to the original units, float64 [problems].

    Raises:
        TypeError: as for `ward_linkage`.
        ValueError: as for `ward_linkage`.
    """
    names = [f"points[{i}]" for i in range(len(points))] if len(points) > 1 else ["points"]
    for name, part, masses in zip(names, points, weights, strict=True):
        _check_form(name, part, masses)
        if part.device != points[0].device:
            raise ValueError(
                f"{name} is on {part.device}, points[0] on {points[0].device}; a batch is clustered on one device"
            )
    sizes = [_magnitude(part) for part in points]
    sound = [size.isfinite() for size in sizes] + [_allowed(part).all() for part in weights if part is not None]
    if not torch.stack(sound).all():
        for name, part, masses in zip(names, points, weights, strict=True):
            _check_values(name, part, masses)
    tiny = torch.finfo(dtype).tiny  # the kernels take a mass of 0 for a dead slot
    flat_points, flat_masses, units = [], [], []
    for part, size, given in zip(points, sizes, weights, strict=True):
        part = part.detach().to(torch.float64)
        masses = part.new_ones(len(part)) if given is None else given.detach().to(torch.float64)
        mass_unit, unit = power_of_two_below(masses.max()), power_of_two_below(size)
        masses = masses / mass_unit
        centre = (masses / masses.sum() / unit) @ part
        part = torch.addcdiv(-centre, part, unit)  # part / unit - centre
        flat_points.append(part.to(dtype).reshape(-1))
        flat_masses.append(masses.to(dtype).clamp_(min=tiny))
        units.append(unit * mass_unit.sqrt())
    if len(points) == 1:
        return flat_points[0], flat_masses[0], units[0][None]
    return torch.cat(flat_points), torch.cat(flat_masses), torch.stack(units)


def _magnitude(points: Tensor) -> Tensor:
    """The largest absolute value, float64 []; NaN if there is any NaN. Takes a single pass over the points."""
    low, high = points.detach().aminmax()
    return torch.maximum(-low, high).to(torch.float64)


def power_of_two_below(number: Tensor) -> Tensor:
    """The largest power of two up to each of these positive float64 numbers, but at least the smallest normal one."""
    exponent = number.view(torch.int64) & 0x7FF0000000000000
    return exponent.view(torch.float64).clamp(min=torch.finfo(torch.float64).tiny)


def _check_form(name: str, points: Tensor, weights: Tensor | None) -> None:
    """Check type, dtype, shape and device: all that needs no transfer of values from the device."""
    if not isinstance(points, Tensor):
        raise TypeError(f"{name} is a {type(points).__name__}, expected a torch.Tensor; use torch.as_tensor(points)")
    if not points.is_floating_point():
        raise TypeError(f"{name} has dtype {points.dtype}, expected a floating dtype; use points.double()")
    if points.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(points.shape)}, expected (n, d); use points.reshape(n, -1)")
    if points.shape[0] == 0 or points.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(points.shape)}, expected at least one point and one dimension")
    if weights is None:
        return
    name = name.replace("points", "weights")
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name} is a {type(weights).__name__}, expected a torch.Tensor; use torch.as_tensor(weights)")
    if weights.dtype == torch.bool or weights.is_complex():
        raise TypeError(f"{name} has dtype {weights.dtype}, expected real numbers; use weights.double()")
    if weights.shape != points.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(weights.shape)}, expected ({len(points)},), one mass per point")
    if weights.device != points.device:
        raise ValueError(f"{name} is on {weights.device}, points on {points.device}; use weights.to(points.device)")


def _check_values(name: str, points: Tensor, weights: Tensor | None) -> None:
    finite = torch.isfinite(points).all(dim=1)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ValueError(f"{name} has NaN or infinity, first in row {row}; remove such rows or repair them")
    if weights is not None and not _allowed(weights).all():
        name = name.replace("points", "weights")
        row = int((~_allowed(weights)).nonzero()[0])
        raise ValueError(
            f"{name}[{row}] is {weights[row].item()}, expected a positive finite mass; drop points without mass"
        )


def _allowed(weights: Tensor) -> Tensor:
    return torch.isfinite(weights) & (weights > 0)
