"""Noise that has something in common with natural images: their spectrum, or edges and even surfaces."""

import math

import torch
from torch import Tensor

_LEAVES = 30  # boxes of an image
_WIDEST = 0.5  # of the image's length


def image_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise of unit standard deviation with a spatial 1/f amplitude spectrum, as in natural images.

    Args:
        shape: [batch, channels, ...].
        generator: on the CPU.
    """
    if len(shape) < 3:
        return torch.randn(shape, generator=generator)
    shared = torch.randn((shape[0], 1, *shape[2:]), generator=generator)
    own = torch.randn(shape, generator=generator)
    white = math.sqrt(0.9) * shared + math.sqrt(0.1) * own  # colour channels of images are correlated
    return pink(white)


def dead_leaves(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Boxes of random sizes and colours that hide one another, of about unit standard deviation.

    Networks learn more of what images need from them than from other noise (Baradad et al., "Learning to See by Looking
    at Noise", NeurIPS 2021).

    Args:
        shape: [batch, channels, ...]; without positions, the values are white noise.
        generator: on the CPU.
    """
    space = len(shape) - 2

    def colours() -> Tensor:
        return torch.randn((*shape[:2], *(1,) * space), generator=generator)

    if space < 1:
        return torch.randn(shape, generator=generator)
    made = colours().expand(shape).clone()
    for _ in range(_LEAVES):
        inside = torch.ones((shape[0], *(1,) * (space + 1)), dtype=torch.bool)
        for dim, length in enumerate(shape[2:]):
            size = (length * _WIDEST * torch.rand(shape[0], generator=generator).square()).long().clamp_min(1)
            first = (torch.rand(shape[0], generator=generator) * (length - size + 1)).long()
            at = torch.arange(length)
            own = (at >= first[:, None]) & (at < (first + size)[:, None])
            inside = inside & own.view(shape[0], 1, *(1,) * dim, length, *(1,) * (space - dim - 1))
        made = torch.where(inside, colours(), made)
    return made


def pink(white: Tensor) -> Tensor:
    """White noise filtered to unit standard deviation and a spatial 1/f amplitude spectrum."""
    space = tuple(range(2, white.ndim))
    squared = torch.zeros(())
    for dim in space:
        squared = squared[..., None] + torch.fft.fftfreq(white.shape[dim]).square()
    amplitude = squared.clamp_min(1 / max(white.shape[2:]) ** 2).rsqrt()
    noise = torch.fft.ifftn(torch.fft.fftn(white, dim=space) * amplitude, dim=space).real
    return noise / noise.std()
