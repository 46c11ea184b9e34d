"""Merging neurons: centroids in their producers, summed outgoing weights in their consumers.

For clusters p of neurons j:

- producers keep the centroid, `W_p = mean_j W_j`, `b_p = mean_j b_j` (the paper's P_l), weighted by masses if given;
- consumers keep the sum, Eq. (9): `W[:, p] = sum_j W[:, j]`;
- a BatchNorm directly after a producer is part of the neuron. The merged channel is the centroid of the members'
  outputs in eval mode, `mean_j (a_j z_j + c_j)`. Its running mean is exact, because the centroid is linear; its running
  variance is estimated from the members' standard deviations and the cosines between their weights. The mean of
  different channels has a smaller standard deviation than each of them. With the rule `"restored"` (the default)
  BatchNorm scales it up to the members' mean standard deviation; with `"centroid"`, the paper's rule, it stays small.

A neuron with label -1 is removed together with its connections. This is pruning, the baseline for merging.
"""

from typing import Literal

import torch
from torch import Tensor

from nac_gpu.calibration.neurons import norm_scale
from nac_gpu.clustering.labels import first_of_each
from nac_gpu.network.deferred import after, loaded
from nac_gpu.network.moving import sent
from nac_gpu.network.precision import working_dtype
from nac_gpu.network.state import selected
from nac_gpu.network.sums import add_rows
from nac_gpu.tracing.graph import Group, Member, Norm, Producer

#: How the standard deviation of a merged channel with BatchNorm is chosen.
Deviation = Literal["restored", "centroid"]


class Merger:
    """Merges one group after another, so that later groups see the merged inputs of earlier ones (Algorithm 1).

    Until `finish`, all tensors keep their size: a cluster is stored at the position of its first neuron, and the other
    positions hold zeros. Zeros do not change the distances between the neurons of later layers.

    Args:
        state: parameters and buffers by name. They are not changed; merged ones are replaced in the merger's own
            `state`.
        deviation: how the standard deviation of a merged channel with BatchNorm is chosen.
    """

    def __init__(self, state: dict[str, Tensor], deviation: Deviation = "restored") -> None:
        self.state = dict(state)
        self._deviation = deviation
        self._dropped: dict[tuple[str, int], Tensor] = {}

    def merge(self, group: Group, labels: Tensor) -> None:
        """Merge the neurons of one group.

        Args:
            group: the group.
            labels: int64 [n], the cluster of each neuron, 0 to k - 1; -1 removes it.
        """
        labels = labels.cpu()
        if keeps_all(labels):
            return
        self.merge_made(group, labels)
        self.merge_read(group, labels)

    def merge_made(self, group: Group, labels: Tensor, masses: Tensor | None = None) -> None:
        """The first half of `merge`: the producers, and the tensors that scale the neurons.

        Args:
            group: the group.
            labels: as for `merge`.
            masses: weights of the neurons in their cluster's centroid, [n], positive; by default all are equal.
        """
        home, share = _homes(labels.cpu(), masses)
        done: set[str] = set()
        for producer in group.producers:
            if producer.norm is not None:
                done |= self._merge_normalised(producer, producer.norm, home, share)
        for norm in group.norms:
            done |= self._merge_norm(norm, group, home, share)
        made = {name for producer in group.producers for name in (producer.member.tensor, producer.bias)}
        for member in group.members:
            if member.role == "mean":
                self._merge_member(member, home, None if member.tensor in done else share)
                if member.tensor not in done | made:
                    self._keep_divisors(member, home)

    def merge_read(self, group: Group, labels: Tensor) -> None:
        """The second half of `merge`: the consumers."""
        home, _ = _homes(labels.cpu())
        for member in group.members:
            if member.role == "sum":
                self._merge_member(member, home, torch.ones(group.size, dtype=torch.float64))

    def _keep_divisors(self, member: Member, home: Tensor) -> None:
        """Write a tensor's merged values at the positions of dropped neurons, too, and ones at those of removed ones.

        The tensor may divide the channels, which must not become NaN. Consumers read them with weights of zero.
        """
        source, target = _spread(member.index, home)
        removed = member.index[home < 0].flatten()

        def kept(values: Tensor) -> Tensor:
            read, written = sent(target, values.device), sent(source, values.device)
            values = values.index_copy(member.dim, written, values.index_select(member.dim, read))
            return values.index_fill(member.dim, sent(removed, values.device), 1)

        self.state[member.tensor] = after(self.state[member.tensor], kept)

    def _merge_member(self, member: Member, home: Tensor, share: Tensor | None) -> None:
        """Write the weighted sum of each cluster (share None: already written) and record the dropped positions."""
        tensor = self.state[member.tensor]
        source, target = _spread(member.index, home)
        if share is not None:
            factor = torch.ones(tensor.shape[member.dim], dtype=torch.float64)
            factor[member.index.flatten()] = share.repeat_interleave(member.index.shape[1])
            self.state[member.tensor] = _combine(tensor, member.dim, source, target, factor)
        if bool((home < 0).any()):
            removed = member.index[home < 0].flatten()
            self.state[member.tensor] = after(
                self.state[member.tensor], lambda values: values.index_fill(member.dim, sent(removed, values.device), 0)
            )
        kept = torch.zeros(tensor.shape[member.dim], dtype=torch.bool)
        kept[target] = True
        dropped = self._dropped.setdefault((member.tensor, member.dim), torch.zeros_like(kept))
        dropped[member.index.flatten()] = ~kept[member.index.flatten()]

    def finish(self) -> dict[str, Tensor]:
        """All parameters and buffers, merged and at their new sizes."""
        state = dict(self.state)
        for (name, dim), dropped in self._dropped.items():
            state[name] = selected(state[name], dim, ~dropped)
        return state

    def _merge_normalised(self, producer: Producer, norm: Norm, home: Tensor, share: Tensor) -> set[str]:
        """A producer and the BatchNorm after it: merged channels are weighted sums `z_p = sum_j q_j z_j`.

        With slopes `a_j`, the choice `q_j = a_j / sum |a|` keeps the merged weights at the scale of the members'
        weights, and the slope at their mean magnitude.
        """
        weight = self.state[producer.member.tensor]
        size = weight.shape[producer.member.dim]
        like = torch.empty(0, dtype=working_dtype(weight), device=weight.device)
        source, target = (sent(index, weight.device) for index in _spread(producer.member.index, home))
        part = torch.zeros(size, dtype=like.dtype, device=weight.device)
        repeated = share.repeat_interleave(producer.member.index.shape[1])
        part[sent(producer.member.index.flatten(), weight.device)] = sent(repeated, weight.device).to(part.dtype)

        def total(values: Tensor) -> Tensor:
            return add_rows(torch.zeros_like(values), 0, target, values[source])

        slope, _, mean = norm_scale(self.state, norm, size, like)
        signed = total(part * slope)
        merged_slope = torch.where(signed < 0, -1, 1) * total(part * slope.abs())
        scale = torch.zeros_like(slope)
        scale[source] = merged_slope[target]
        q = torch.where(scale != 0, part * slope / torch.where(scale != 0, scale, 1), part)

        done = {producer.member.tensor}
        self.state[producer.member.tensor] = _combine(weight, producer.member.dim, source, target, q)
        if producer.bias is not None:
            done.add(producer.bias)
            self.state[producer.bias] = _combine(self.state[producer.bias], 0, source, target, q)

        alone = torch.bincount(target, minlength=size) <= 1
        deviation = torch.ones_like(slope)
        if norm.variance is not None:
            variance = self.state[norm.variance].to(like.dtype)
            flat = weight.movedim(producer.member.dim, 0).reshape(size, -1).to(like.dtype)
            directions = flat / flat.norm(dim=1, keepdim=True).clamp_min(torch.finfo(like.dtype).tiny)
            merged = total((q * variance.sqrt())[:, None] * directions).square().sum(1)
            if (
                norm.weight is None and self._deviation == "centroid"
            ):  # without a weight, only the variance can set the slope
                merged = merged_slope.square().reciprocal() - norm.eps
            merged = torch.where(alone, variance, merged)
            deviation = torch.sqrt(merged + norm.eps)
            self._put(norm.variance, merged, source, target)
        if norm.weight is not None:
            old = self.state[norm.weight].to(like.dtype)
            gain = merged_slope * deviation
            if self._deviation == "restored" and norm.variance is not None:
                gain = torch.where(signed < 0, -1, 1) * total(part * old.abs())
            self._put(norm.weight, torch.where(alone, old, gain), source, target)
        if norm.mean is not None:
            self._put(norm.mean, total(q * mean), source, target)
        if norm.bias is not None:  # offset + slope * mean is the bias of BatchNorm
            self._put(norm.bias, total(part * self.state[norm.bias].to(like.dtype)), source, target)
        return done | {name for name in (norm.weight, norm.bias, norm.mean, norm.variance) if name is not None}

    def _merge_norm(self, norm: Norm, group: Group, home: Tensor, share: Tensor) -> set[str]:
        """A BatchNorm without a single producer: mean slopes and offsets, with mean statistics."""
        names = [name for name in (norm.weight, norm.bias, norm.mean, norm.variance) if name is not None]
        if not names or norm.weight is None or norm.variance is None or norm.mean is None or norm.bias is None:
            return set()  # the tensors that exist are averaged like all others
        member = next(m for m in group.members if m.tensor == norm.weight)
        weight = self.state[norm.weight]
        like = torch.empty(0, dtype=working_dtype(weight), device=weight.device)
        source, target = (sent(index, weight.device) for index in _spread(member.index, home))
        part = torch.zeros(len(weight), dtype=like.dtype, device=weight.device)
        repeated = share.repeat_interleave(member.index.shape[1])
        part[sent(member.index.flatten(), weight.device)] = sent(repeated, weight.device).to(part.dtype)

        def total(values: Tensor) -> Tensor:
            return add_rows(torch.zeros_like(values), 0, target, values[source])

        slope, offset, mean = norm_scale(self.state, norm, len(weight), like)
        merged_mean, merged_slope = total(part * mean), total(part * slope)
        variance = total(part * self.state[norm.variance].to(like.dtype))
        self._put(norm.weight, merged_slope * torch.sqrt(variance + norm.eps), source, target)
        self._put(norm.bias, total(part * offset) + merged_slope * merged_mean, source, target)
        self._put(norm.mean, merged_mean, source, target)
        self._put(norm.variance, variance, source, target)
        return set(names)

    def _put(self, name: str, values: Tensor, source: Tensor, target: Tensor) -> None:
        """Write merged per-channel values [size] at the positions of the clusters; other members become zero."""
        new = loaded(self.state[name]).clone()
        new[source] = 0
        new[target] = values[target].to(new.dtype)
        self.state[name] = new


def keeps_all(labels: Tensor) -> bool:
    """Whether labels, int64 [n], put every neuron in a cluster of its own."""
    return int(labels.max()) + 1 == len(labels)


def _homes(labels: Tensor, masses: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For each neuron, the first neuron of its cluster (-1: removed), int64 [n], and its share in it, float64 [n]."""
    n = len(labels)
    masses = torch.ones(n, dtype=torch.float64) if masses is None else masses.to("cpu", torch.float64)
    kept = labels >= 0
    first = first_of_each(labels)
    whole = torch.zeros(len(first), dtype=torch.float64).index_add_(0, labels[kept], masses[kept])
    home = torch.full((n,), -1, dtype=torch.int64)
    home[kept] = first[labels[kept]]
    share = torch.zeros(n, dtype=torch.float64)
    share[kept] = masses[kept] / whole[labels[kept]]
    return home, share


def _spread(index: Tensor, home: Tensor) -> tuple[Tensor, Tensor]:
    """Source and target positions of all neurons that are not removed: two int64 [m] from `index` [n, width]."""
    kept = home >= 0
    return index[kept].flatten(), index[home[kept]].flatten()


def _combine(tensor: Tensor, dim: int, source: Tensor, target: Tensor, factor: Tensor) -> Tensor:
    """Along one dimension, write the factor-weighted sum of each cluster's members at the cluster's position."""

    def combined(tensor: Tensor) -> Tensor:
        read, written = sent(source, tensor.device), sent(target, tensor.device)
        work = tensor.to(working_dtype(tensor))
        shape = [1] * tensor.ndim
        shape[dim] = len(read)
        parts = work.index_select(dim, read) * sent(factor, work.device).to(work.dtype)[read].reshape(shape)
        merged = add_rows(work.clone().index_fill_(dim, read, 0), dim, written, parts)
        return merged.to(tensor.dtype)

    return after(tensor, combined)
