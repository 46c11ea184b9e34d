"""What the neurons of a group do for the layers that read them, as matrices."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Activity:
    """How the neurons of a group are read, a pair of matrices for each reading.

    Attributes:
        covariances: of the neurons' activations, float64 [n, n] each.
        gains: inner products of the neurons' outgoing weights, float64 [n, n] each.
    """

    covariances: tuple[Tensor, ...]
    gains: tuple[Tensor, ...]

    def energies(self) -> Tensor:
        """What each neuron's activations contribute to the variance of what its readers make, float64 [n]."""
        total = torch.zeros_like(self.gains[0][0])
        for covariance, gain in zip(self.covariances, self.gains, strict=True):
            own = covariance.diagonal() * gain.diagonal()
            total = total + own / own.sum().clamp_min(torch.finfo(own.dtype).tiny)
        return total

    def masses(self) -> Tensor:
        """What each neuron counts in a cluster, float64 [n]: what it contributes to its readers' variance, above 0."""
        energies = self.energies()
        return torch.maximum(energies, (1e-6 * energies.max()).clamp_min(torch.finfo(energies.dtype).tiny))

    def points(self) -> tuple[Tensor, Tensor]:
        """Neurons as points for clustering, and their masses: float64 [n, n] and [n].

        Activations are compared by their correlation, so that neurons that differ in scale only are the same.
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


# Of the mean of a Gram matrix's diagonal: what rounding may take from it, and more where that is not enough.
_TRIFLES = (1e-14, 1e-12, 1e-10)


def _root(gram: Tensor) -> Tensor:
    """Points with these inner products: [n, n].

    A Cholesky factor, which takes far fewer operations than eigenvectors. Where the matrix has not full rank, a trifle
    on its diagonal moves all points apart alike.
    """
    unit = gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for trifle in _TRIFLES:
        factor, failed = torch.linalg.cholesky_ex(gram + trifle * unit)
        if not bool(failed):
            return factor
    values, vectors = torch.linalg.eigh(gram)  # nothing but zeros, or rounded by more than that
    return vectors * values.clamp_min(0).sqrt()
