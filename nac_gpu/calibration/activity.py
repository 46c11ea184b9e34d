"""The activations of a group and the outgoing weights that read them, as matrices."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from nac_gpu.calibration.moments import Part
from nac_gpu.network.moving import sent


@dataclass(frozen=True)
class Activity:
    """The activations and outgoing weights of a group, one of each for each consumer.

    Attributes:
        covariances: of the neurons' activations, float64 [n, n] each. Where the consumer's outputs can get no
            constant, their mean products: what is constant is then not free.
        outgoing: the neurons' outgoing weights, or others with the same inner products, float64 [n, q] each.
        halves: for each consumer the moments of the neurons' activations on one half of the inputs and on the other;
            none if the inputs are too few to be divided.
        constants: for each consumer, whether its outputs can get a constant.
        values: by the name of a consumer, the same as halves for all values that it reads, of which a neuron may have
            several: [n * m]. Only of layers whose outputs at a position read one position, and not of too many values.
    """

    covariances: tuple[Tensor, ...]
    outgoing: tuple[Tensor, ...]
    halves: tuple[tuple[Part, ...], ...] = ()
    constants: tuple[bool, ...] = ()
    values: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)

    def parts(self) -> list[tuple[Tensor, ...]]:
        """For each consumer the moments to fit to and to judge by, [n, n] each; the same ones if there are no halves.

        They are about the mean where the consumer's outputs can get a constant, like `covariances`.
        """
        if not self.halves:
            return [(covariance, covariance) for covariance in self.covariances]
        pairs = zip(self.halves, self.constants, strict=True)
        return [tuple(half.about(constant) for half in halves) for halves, constant in pairs]

    def contributions(self) -> tuple[Tensor, ...]:
        """Each neuron's share of the variance of each consumer's outputs, as if they were uncorrelated: float64 [n]."""
        found = []
        for covariance, weights in zip(self.covariances, self.outgoing, strict=True):
            own = covariance.diagonal().clamp_min(0) * weights.square().sum(1)
            found.append(own / own.sum().clamp_min(torch.finfo(own.dtype).tiny))
        return tuple(found)

    def energies(self) -> Tensor:
        """Each neuron's contribution to the variance of the consumers' outputs, float64 [n].

        Every consumer's variance is normalised to 1, so that all consumers count alike.
        """
        return torch.stack(self.contributions()).sum(0)

    def masses(self) -> Tensor:
        """The weight of each neuron in its cluster, float64 [n]: its energy, bounded below by a positive number."""
        energies = self.energies()
        return torch.maximum(energies, (1e-6 * energies.max()).clamp_min(torch.finfo(energies.dtype).tiny))

    def points(self) -> tuple[Tensor, Tensor]:
        """Neurons as points for clustering, and their masses: float64 [n, n] and [n].

        Activations are compared by correlation, so neurons that differ only in scale get the same point.
        """
        return _root(self._similarities()), self.masses()

    def _similarities(self) -> Tensor:
        """Correlations of the neurons, averaged over the consumers that they contribute to: float64 [n, n]."""
        energies = self.energies()
        similar = torch.zeros_like(self.covariances[0])
        tiny = torch.finfo(similar.dtype).tiny
        for covariance, own in zip(self.covariances, self.contributions(), strict=True):
            scale = (own / energies.clamp_min(tiny)).sqrt()
            deviation = covariance.diagonal().clamp_min(0).sqrt()
            alive = deviation > 1e-6 * deviation.max()
            scale = torch.where(alive, scale / torch.where(alive, deviation, 1), 0)
            similar += covariance * torch.outer(scale, scale)
        return similar

    def removal(self, kept: int) -> Tensor:
        """Labels that keep the neurons that contribute most to the consumers' outputs and remove the others.

        The measure is that of structured pruning by activations and weights (Sun et al., "A Simple and Effective
        Pruning Approach for Large Language Models", ICLR 2024; An et al., "Fluctuation-based Adaptive Structured
        Pruning for Large Language Models", AAAI 2024): the variance of a neuron times the squared norm of its outgoing
        weights.

        Args:
            kept: how many, 1 to n.

        Returns:
            int64 [n], on the CPU: 0 to kept - 1, in order; -1 for removed ones.
        """
        labels = torch.full((len(self._ranking),), -1, dtype=torch.int64)
        labels[self._ranking[:kept].sort().values] = torch.arange(kept)
        return labels

    @cached_property
    def _ranking(self) -> Tensor:
        """The neurons in the order of their energies, on the CPU: the host waits for the device once."""
        return self.energies().cpu().argsort(descending=True, stable=True)

    def mixed(self, kept: int) -> Tensor:
        """Labels as of `removal`, but neurons much like one that is kept are merged with it in place of removed."""
        labels = self.removal(kept)
        stays, goes = (labels >= 0).nonzero().flatten(), (labels < 0).nonzero().flatten()
        similar = self._similarities()
        rows, columns = (sent(places, similar.device) for places in (goes, stays))
        likest, which = (found.cpu() for found in similar[rows][:, columns].max(1))
        alike = likest > _ALIKE
        labels[goes[alike]] = which[alike]
        return labels


_ALIKE = 0.8  # correlation of neurons that are merged in place of removed
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


def condensed(weights: Tensor) -> Tensor:
    """Rows [n, min(n, q)] with the inner products of rows [n, q]."""
    if weights.shape[1] <= len(weights):
        return weights
    return _root(weights @ weights.T)
