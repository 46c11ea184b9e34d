"""Merging neurons: centroids in their producers, summed outgoing weights in their consumers.

For clusters p of neurons j:

- producers keep the centroid, `W_p = mean_j W_j`, `b_p = mean_j b_j` (the paper's P_l), weighted by masses if given;
- consumers keep the sum, Eq. (9): `W[:, p] = sum_j W[:, j]`;
- a BatchNorm directly after a producer is part of the neuron. The merged channel is the centroid of the members'
  outputs in eval mode, `mean_j (a_j z_j + c_j)`. Its running mean is exact, because the centroid is linear; its running
  variance is estimated from the members' standard deviations and the cosines between their weights. The mean of
  different channels has a smaller standard deviation than each of them. With the rule `"restored"` (the default)
  BatchNorm scales it up to the members' mean standard deviation; with `"centroid"`, the paper's rule, it stays small.

Members that are equal in every bit keep their values: the centroid of copies is the first of them, without rounding.
Members that BatchNorm makes equal (constants, or multiples of one another) merge without changing what they compute.

A neuron with label -1 is removed together with its connections. This is pruning, the baseline for merging.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nac_gpu.calibration.neurons import norm_scale
from nac_gpu.clustering.labels import first_of_each
from nac_gpu.clustering.points import power_of_two_below
from nac_gpu.network.deferred import Deferred, after, loaded
from nac_gpu.network.moving import sent
from nac_gpu.network.precision import working_dtype
from nac_gpu.network.state import selected
from nac_gpu.network.sums import add_rows
from nac_gpu.tracing.graph import Choice, Group, Member, Norm, Producer

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
        self._deviation: Deviation = deviation
        self._dropped: dict[tuple[str, int], Tensor] = {}

    def copy(self) -> "Merger":
        """Another one with the same groups merged; what is merged by one is not by the other."""
        made = Merger(self.state, self._deviation)
        made._dropped = {key: dropped.clone() for key, dropped in self._dropped.items()}
        return made

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
        copies, stays = self._copies(group, home), home == torch.arange(group.size)
        if bool((copies | stays).all()):  # the first of each cluster is its centroid
            for member in group.members:
                if member.role == "mean":
                    self._drop(member, home)
            return
        share = torch.where(copies, stays.double(), share)
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
                tensor, (source, target) = self.state[member.tensor], _spread(member.index, home)
                self.state[member.tensor] = _combine(tensor, member.dim, source, target)
                self._drop(member, home)

    def _copies(self, group: Group, home: Tensor) -> Tensor:
        """Which neurons are in a cluster of neurons that are equal in every bit: bool [n].

        Tensors in files are not read for this: none of their neurons count as copies.
        """
        made = [member for member in group.members if member.role == "mean"]
        moved = ((home >= 0) & (home != torch.arange(group.size))).nonzero().flatten()
        alike = torch.zeros(group.size, dtype=torch.bool)
        if any(isinstance(self.state[member.tensor], Deferred) for member in made):
            return alike
        for member in made:
            if not len(moved):
                return alike
            values = self.state[member.tensor].movedim(member.dim, 0)
            own, first = (sent(member.index[places].flatten(), values.device) for places in (moved, home[moved]))
            equal = (values[own] == values[first]).reshape(len(moved), -1).all(1)
            moved = moved[equal.cpu()]
        alike[moved] = True
        counts = torch.bincount(home[home >= 0], minlength=group.size)
        whole = torch.bincount(home[alike], minlength=group.size) == counts - 1
        return (home >= 0) & (whole & (counts > 1))[home]

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
        self._drop(member, home)

    def _drop(self, member: Member, home: Tensor) -> None:
        """Record the positions of merged neurons, and write zeros at those of removed ones."""
        tensor = self.state[member.tensor]
        _, target = _spread(member.index, home)
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
        for (name, dim), dropped in sorted(self._dropped.items(), key=lambda item: item[0][1]):  # whole rows first
            state[name] = selected(state[name], dim, ~dropped)
        return state

    def _merge_normalised(self, producer: Producer, norm: Norm, home: Tensor, share: Tensor) -> set[str]:
        """A producer and the BatchNorm after it: merged channels are weighted sums `z_p = sum_j q_j z_j`.

        With slopes `a_j`, the choice `q_j = a_j / sum |a|` keeps the merged weights at the scale of the members'
        weights, and the slope at their mean magnitude.
        """
        weight = self.state[producer.member.tensor]
        size = weight.shape[producer.member.dim]
        channels = _Channels.of(weight, producer.member, home, share)
        part, total, source, target = channels.part, channels.total, channels.source, channels.target
        slope, _, mean = norm_scale(self.state, norm, size, part)
        sign = torch.where(total(part * slope) < 0, -1, 1)
        merged_slope = sign * total(part * slope.abs())
        scale = torch.zeros_like(slope)
        scale[source] = merged_slope[target]
        q = torch.where(scale != 0, part * slope / torch.where(scale != 0, scale, 1), part)

        done = {producer.member.tensor}
        self.state[producer.member.tensor] = _combine(weight, producer.member.dim, source, target, q)
        if producer.bias is not None:
            done.add(producer.bias)
            self.state[producer.bias] = _combine(self.state[producer.bias], 0, source, target, q)

        alone, equal = channels.alone, torch.zeros_like(channels.alone)
        deviation = torch.ones_like(slope)
        if norm.variance is not None:
            variance = self.state[norm.variance].to(part.dtype)
            flat = loaded(weight.movedim(producer.member.dim, 0)).reshape(size, -1)
            equal = channels.equal(slope[:, None] * flat.to(part.dtype), 8 * torch.finfo(weight.dtype).eps)
            merged = _merged_variance(channels, flat.to(part.dtype), q * variance.sqrt())
            if norm.weight is None:  # only the variance can set the slope
                exact = (merged_slope.square().reciprocal() - norm.eps).clamp(0, torch.finfo(part.dtype).max)
                merged = exact if self._deviation == "centroid" else torch.where(equal, exact, merged)
            merged = torch.where(alone, variance, merged)
            deviation = torch.sqrt(merged + norm.eps)
            self._put(norm.variance, merged, source, target)
        if norm.weight is not None:
            old = self.state[norm.weight].to(part.dtype)
            gain = merged_slope * deviation
            if self._deviation == "restored" and norm.variance is not None:
                gain = torch.where(equal, gain, sign * total(part * old.abs()))
            self._put(norm.weight, torch.where(alone, old, gain), source, target)
        if norm.mean is not None:
            self._put(norm.mean, total(q * mean), source, target)
        if norm.bias is not None:  # offset + slope * mean is the bias of BatchNorm
            self._put(norm.bias, total(part * self.state[norm.bias].to(part.dtype)), source, target)
        return done | {name for name in (norm.weight, norm.bias, norm.mean, norm.variance) if name is not None}

    def _merge_norm(self, norm: Norm, group: Group, home: Tensor, share: Tensor) -> set[str]:
        """A BatchNorm without a single producer: mean slopes and offsets, with mean statistics."""
        names = [name for name in (norm.weight, norm.bias, norm.mean, norm.variance) if name is not None]
        if not names or norm.weight is None or norm.variance is None or norm.mean is None or norm.bias is None:
            return set()  # the tensors that exist are averaged like all others
        member = next(m for m in group.members if m.tensor == norm.weight)
        weight = self.state[norm.weight]
        channels = _Channels.of(weight, member, home, share)
        part, total = channels.part, channels.total
        slope, offset, mean = norm_scale(self.state, norm, len(weight), part)
        merged_mean, merged_slope = total(part * mean), total(part * slope)
        variance = total(part * self.state[norm.variance].to(part.dtype))
        gain, bias = merged_slope * torch.sqrt(variance + norm.eps), total(part * offset) + merged_slope * merged_mean
        copies = channels.alone & channels.several
        merged = {norm.weight: gain, norm.bias: bias, norm.mean: merged_mean, norm.variance: variance}
        for name, values in merged.items():
            values = torch.where(copies, self.state[name].to(part.dtype), values)
            self._put(name, values, channels.source, channels.target)
        return set(names)

    def _put(self, name: str, values: Tensor, source: Tensor, target: Tensor) -> None:
        """Write merged per-channel values [size] at the positions of the clusters; other members become zero."""
        new = loaded(self.state[name]).clone()
        new[source] = 0
        new[target] = values[target].to(new.dtype)
        self.state[name] = new


def merged(
    state: Mapping[str, Tensor], choices: Sequence[Choice], labels: Sequence[Tensor], deviation: Deviation = "restored"
) -> dict[str, Tensor]:
    """Smaller tensors in which the neurons of each group are merged.

    Args:
        state: tensors by name; not changed.
        choices: the groups.
        labels: for each group, int64 [n], as `Merger.merge` takes them.
        deviation: as for `Merger`.
    """
    merger = Merger(dict(state), deviation)
    for choice, own in zip(choices, labels, strict=True):
        merger.merge(choice.group, own)
    return merger.finish()


def homes_of(labels: Tensor) -> Tensor:
    """For each neuron, the first neuron of its cluster, where the cluster is stored: int64 [n]; no label is -1."""
    return first_of_each(labels)[labels]


@dataclass(frozen=True)
class _Channels:
    """The channels along one dimension of a tensor, and the clusters that they are merged into.

    Attributes:
        source: positions of all channels that are not removed, int64 [m].
        target: for each of them the position at which its cluster is stored, int64 [m].
        part: the share of each channel in its cluster, [size], in the dtype of the arithmetic.
        several: at the positions of clusters, whether they have several members: bool [size].
        alone: whether a single member has all of the share: bool [size].
    """

    source: Tensor
    target: Tensor
    part: Tensor
    several: Tensor
    alone: Tensor

    @staticmethod
    def of(tensor: Tensor, member: Member, home: Tensor, share: Tensor) -> "_Channels":
        """From the home and the share of each neuron, see `_homes`."""
        device, size = tensor.device, tensor.shape[member.dim]
        source, target = (sent(index, device) for index in _spread(member.index, home))
        part = torch.zeros(size, dtype=working_dtype(tensor), device=device)
        repeated = share.repeat_interleave(member.index.shape[1])
        part[sent(member.index.flatten(), device)] = sent(repeated, device).to(part.dtype)
        several = torch.bincount(target, minlength=size) > 1
        alone = torch.bincount(target[part[source] > 0], minlength=size) <= 1
        return _Channels(source, target, part, several, alone)

    def total(self, values: Tensor) -> Tensor:
        """The sum over each cluster of values [size, ...], at the cluster's position; zero elsewhere."""
        return add_rows(torch.zeros_like(values), 0, self.target, values[self.source])

    def equal(self, values: Tensor, tolerance: float) -> Tensor:
        """At the positions of clusters, whether their members have the same values [size, d]: bool [size].

        Args:
            values: one row for each channel.
            tolerance: relative to the largest absolute value of the row at the cluster's position.
        """
        first = values[self.target]
        apart = (values[self.source] - first).abs().amax(1)
        other = ~(apart <= tolerance * first.abs().amax(1))  # also where a row has overflowed
        return torch.bincount(self.target[other], minlength=len(values)) == 0


def _merged_variance(channels: _Channels, rows: Tensor, deviations: Tensor) -> Tensor:
    """The variance of each merged channel, from the cosines between its members' weights: [size].

    Args:
        channels: the clusters.
        rows: weights [size, d].
        deviations: the standard deviation of each channel times its weight in the sum, [size].
    """
    tiny = torch.finfo(rows.dtype).tiny
    # A power of two changes no bit of the directions, but keeps squares of very small and large weights in range.
    unit = power_of_two_below(rows.abs().amax(1, keepdim=True).double()).to(rows.dtype).clamp_min(tiny)
    scaled = rows / unit
    lengths = scaled.norm(dim=1, keepdim=True)
    merged = channels.total(deviations[:, None] * (scaled / lengths.clamp_min(tiny))).square().sum(1)
    # Rows of zeros have no direction. Where there are no others, the channels are constants, which do not cancel out.
    living = channels.total((lengths > 0).to(rows.dtype).squeeze(1)) > 0
    return torch.where(living, merged, channels.total(deviations.abs()).square())


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


def _combine(tensor: Tensor, dim: int, source: Tensor, target: Tensor, factor: Tensor | None = None) -> Tensor:
    """Along one dimension, write the (factor-weighted) sum of each cluster's members at the cluster's position."""
    moves = source != target

    def combined(tensor: Tensor) -> Tensor:
        read, written = sent(source[moves], tensor.device), sent(target[moves], tensor.device)
        work = tensor.to(working_dtype(tensor))
        if factor is None:
            work = work.clone() if work is tensor else work
        else:
            shape = [1] * tensor.ndim
            shape[dim] = -1
            own = sent(source, work.device)
            factors = work.new_ones(work.shape[dim]).index_copy_(0, own, sent(factor, work.device).to(work.dtype)[own])
            work = work * factors.reshape(shape)
        add_rows(work, dim, written, work.index_select(dim, read))
        return work.index_fill_(dim, read, 0).to(tensor.dtype)

    return after(tensor, combined)
