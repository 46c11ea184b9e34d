"""The activations of a group and the outgoing weights that read them, as matrices."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Activity:
    """The activations and outgoing weights of a group, one pair of matrices for each consumer.

    Attributes:
        covariances: of the neurons' activations, float64 [n, n] each.
        gains: inner products of the neurons' outgoing weights, float64 [n, n] each.
    """

    covariances: tuple[Tensor, ...]
    gains: tuple[Tensor, ...]

    def energies(self) -> Tensor:
        """Each neuron's contribution to the variance of the consumers' outputs, float64 [n].

        Every consumer's variance is normalised to 1, so that all consumers count alike.
        """
        total = torch.zeros_like(self.gains[0][0])
        for covariance, gain in zip(self.covariances, self.gains, strict=True):
            own = covariance.diagonal() * gain.diagonal()
            total = total + own / own.sum().clamp_min(torch.finfo(own.dtype).tiny)
        return total

    def masses(self) -> Tensor:
        """The weight of each neuron in its cluster, float64 [n]: its energy, bounded below by a positive number."""
        energies = self.energies()
        return torch.maximum(energies, (1e-6 * energies.max()).clamp_min(torch.finfo(energies.dtype).tiny))

    def points(self) -> tuple[Tensor, Tensor]:
        """Neurons as points for clustering, and their masses: float64 [n, n] and [n].

        Activations are compared by correlation, so neurons that differ only in scale get the same point.
        """
        energies = self.energies()
        similar = torch.zeros_like(self.gains[0])
        tiny = torch.finfo(similar.dtype).tiny
        for covariance, gain in zip(self.covariances, self.gains, strict=True):
            own = covariance.diagonal() * gain.diagonal()
            scale = (own / own.sum().clamp_min(tiny) / energies.clamp_min(tiny)).clamp_min(0).sqrt()
            deviation = covariance.diagonal().clamp_min(0).sqrt()
            alive = deviation > 1e-6 * deviation.max()
            scale = torch.where(alive, scale / torch.where(alive, deviation, 1), 0)
            similar += covariance * torch.outer(scale, scale)
        return _root(similar), self.masses()


# Jitter for the Cholesky factorisation, relative to the mean diagonal: tried in this order until one is enough.
_TRIFLES = (1e-14, 1e-12, 1e-10)


def _root(gram: Tensor) -> Tensor:
    """Points with these inner products: [n, n].

    A Cholesky factor needs far fewer operations than an eigendecomposition. Where the matrix is rank-deficient, a
    small number is added to its diagonal, which increases all squared distances equally.
    """
    unit = gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for trifle in _TRIFLES:
        factor, failed = torch.linalg.cholesky_ex(gram + trifle * unit)
        if not bool(failed):
            return factor
    values, vectors = torch.linalg.eigh(gram)  # all zeros, or rounding errors above the jitter
    return vectors * values.clamp_min(0).sqrt()
