"""Noise with the spectrum of natural images."""

import math

import torch
from torch import Tensor


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


def pink(white: Tensor) -> Tensor:
    """White noise filtered to unit standard deviation and a spatial 1/f amplitude spectrum."""
    space = tuple(range(2, white.ndim))
    squared = torch.zeros(())
    for dim in space:
        squared = squared[..., None] + torch.fft.fftfreq(white.shape[dim]).square()
    amplitude = squared.clamp_min(1 / max(white.shape[2:]) ** 2).rsqrt()
    noise = torch.fft.ifftn(torch.fft.fftn(white, dim=space) * amplitude, dim=space).real
    return noise / noise.std()
