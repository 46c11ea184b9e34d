"""Merging similar experts of a mixture into one. This is an approximation, done only on request.

Experts are clustered by Ward's method. They are compared by the products of outgoing and incoming weights, which is the
function that they would compute with linear activations and does not depend on the order of their neurons. The neurons
of all experts in a cluster are put into one expert that computes the mean of their outputs. Its neurons are then merged
to the number that one expert had, so experts that differ only in the order of their neurons merge without error.
(Related work: Chen et al., "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering", ICML 2025, compares
experts by their outputs; Li et al., "Merge, Then Compress", ICLR 2024, averages weights after aligning neurons.)

The router's rows of a cluster are averaged. Depending on how the router normalises its scores, the merged expert has to
return the mean of its members, their sum or less; all are tried (see `_nearest`). If a router picks several experts
and two of them are merged, another expert takes the free place. So the function changes even if experts are equal;
refinement reduces this error.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nac_gpu.calibration.batches import Calibration, Divided
from nac_gpu.calibration.gathering import gather
from nac_gpu.calibration.neurons import rows
from nac_gpu.clustering.linkage import ward_linkage
from nac_gpu.experts.counts import Entry, attributes, entries, set_configs
from nac_gpu.experts.mixtures import Lookalike, Mixture, find_mixtures
from nac_gpu.files.origin import origin_of, remember, shorten
from nac_gpu.merging.refinement import PASSES, Amount, learn
from nac_gpu.network.ambient import ordinary, undisturbed
from nac_gpu.network.checking import check_model, check_weights
from nac_gpu.network.comparing import change, mean_change, outputs
from nac_gpu.network.copying import copied, ordinary_model, rebuild
from nac_gpu.network.costs import Cost
from nac_gpu.network.counting import cost
from nac_gpu.network.precision import working_dtype
from nac_gpu.network.probes import lively
from nac_gpu.network.running import ExampleInputs, set_mode_again
from nac_gpu.network.state import is_open, tensors
from nac_gpu.network.sums import add_rows
from nac_gpu.network.unwrapping import computed, unwrapped
from nac_gpu.planning.layers import kept_of
from nac_gpu.planning.plans import Plan
from nac_gpu.planning.request import checked_passes, checked_seed
from nac_gpu.tracing.graph import Group, Member
from nac_gpu.tracing.trace import record

Experts = int | float | Mapping[str, int | float]
_DIRECTIONS = 64  # random directions in which the products of an expert are compared


@undisturbed()
def merge_experts(
    model: nn.Module,
    example_inputs: ExampleInputs,
    experts: Experts,
    *,
    calibration: Calibration = "dream",
    refine: int = PASSES,
    seed: int = 0,
) -> nn.Module:
    """A copy of a model in which similar experts are merged; `nac_gpu.compress` can merge their neurons afterwards.

    Args:
        model: any module with a router and experts of equal shapes, in a list or stacked in common tensors.
        example_inputs: as for `nac_gpu.compress`. Experts of a list that they do not reach are merged, too.
        experts: how many to keep in every mixture: a number (int) or a share (float); or a mapping from names of
            modules that contain experts (or patterns such as `"*.experts"`) to either, where the others keep theirs.
            Keep at least as many as the router picks.
        calibration: inputs for refinement, as for `nac_gpu.compress`.
        refine: passes over these inputs (see `nac_gpu.merging.refinement`).
        seed: of synthetic inputs and of refinement; the global random state is not touched.

    Returns:
        A new module, as of `nac_gpu.compress`. Numbers of experts in attributes and configurations are updated.

    Raises:
        ValueError: no mixture was found (lists lookalikes with reasons), an unknown name, more experts than there are,
            fewer than the router picks, weights that are not finite, a model of `nac_gpu.open_model`.
        TypeError: integer or complex weights, calibration data of another type than the example inputs.
        RuntimeError: the forward pass fails on the example inputs or the calibration data.

    >>> class Mixture(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.router, self.experts = nn.Linear(8, 4), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    ...     def forward(self, x):
    ...         return sum(s * e(x) for s, e in zip(self.router(x).softmax(-1).T[..., None], self.experts))
    >>> len(nac_gpu.merge_experts(Mixture(), torch.randn(16, 8), 2, calibration="none").experts)
    2
    """
    refine, seed = checked_passes(refine), checked_seed(seed)
    network, wrappers = unwrapped(model)
    check_model(network)
    network, example_inputs = ordinary_model(network), ordinary(example_inputs)
    if is_open(network):
        raise ValueError("expected a model in memory, not one of nac_gpu.open_model, whose weights are in files")
    model, changes = computed(network)
    check_weights(model)
    fewer = _Fewer.found(model, example_inputs, experts)
    evidence = gather(model, example_inputs, (), calibration, seed) if refine and calibration != "none" else None
    batches = list(evidence.batches) if evidence is not None and not evidence.float32 else []  # else for a copy
    small = fewer.network(model, batches[0] if batches else _lively(example_inputs, seed))
    source = [] if evidence is None else ["not refined: " * evidence.float32 + evidence.source]
    said = (*wrappers, *changes, *fewer.told(type(model).__name__), *source)
    remember(small, model, _plan(model, said, cost(model, example_inputs), cost(small, example_inputs)), seed)
    if fewer.changed and evidence is not None and batches:
        inputs, synthetic = Divided(batches, evidence.judged), evidence.synthetic
        learn(small, model, fewer.touched(), inputs, Amount(refine), synthetic=synthetic, seed=seed)
    return small


def _lively(example_inputs: ExampleInputs, seed: int) -> ExampleInputs:
    """Random inputs: those of zeros would not show how the router normalises its scores."""
    generator = torch.Generator().manual_seed(seed)
    return pytree.tree_map(lambda value: lively(value, generator), example_inputs)


def _kept(found: Sequence[Mixture], others: Sequence[Lookalike], experts: Experts) -> list[int]:
    """The number of experts that each mixture keeps."""
    if not found:
        looked = "; ".join(f"{other.name or 'the model'}: {other.why}" for other in others)
        raise ValueError(
            "no mixture of experts was found, expected modules of equal shapes in a ModuleList or ModuleDict, or "
            "several tensors with a row for each expert, and near them a router's matrix with as many entries"
            f"{': ' + looked if looked else ''}"
        )
    if not isinstance(experts, Mapping):
        return [kept_of(mixture.name, mixture.count, experts, "experts") for mixture in found]
    kept = [mixture.count for mixture in found]
    for pattern, value in experts.items():
        matching = [number for number, mixture in enumerate(found) if fnmatchcase(mixture.name, pattern)]
        if not matching:
            why = next((other.why for other in others if other.name == pattern), "")
            known = ", ".join(mixture.name for mixture in found)
            raise ValueError(f"unknown experts {pattern!r}{': ' + why if why else ''}; expected some of: {known}")
        for number in matching:
            kept[number] = kept_of(pattern, found[number].count, value, "experts")
    return kept


@dataclass(frozen=True)
class _Changed:
    """A mixture and its merged experts.

    Attributes:
        mixture: the mixture.
        hidden: positions of an expert's hidden neurons in its parts; empty if they are not one group.
        clusters: the numbers of the experts that are merged.
        experts: the merged experts, by part.
    """

    mixture: Mixture
    hidden: tuple[Member, ...]
    clusters: list[list[int]]
    experts: list[dict[str, Tensor]]

    @staticmethod
    def made(mixture: Mixture, count: int, state: Mapping[str, Tensor], hidden: tuple[Member, ...]) -> "_Changed":
        own = [_working(mixture.expert(state, number)) for number in range(mixture.count)]
        clusters = _clusters(torch.stack([_sketch(expert, hidden) for expert in own]), count)
        return _Changed(mixture, hidden, clusters, [_one([own[n] for n in numbers], hidden) for numbers in clusters])

    def told(self, model: str) -> str:
        """One line for the printed plan."""
        how = "" if self.hidden else ", by the means of their weights: their hidden neurons are not one group"
        return f"{self.mixture.name or model}: {self.mixture.count} experts became {len(self.clusters)}{how}"

    def tensors(self, state: Mapping[str, Tensor], power: int, logarithm: bool) -> dict[str, Tensor]:
        """The new tensors by name.

        Args:
            state: the original's.
            power: a merged expert returns the mean of its m members, times m to this power.
            logarithm: add log(m) to the router's bias.
        """
        sizes = [len(cluster) for cluster in self.clusters]
        experts = [self._times(expert, size**power) for expert, size in zip(self.experts, sizes, strict=True)]
        new = self.mixture.written(experts)
        for name, dim in self.mixture.router:
            exact = state[name].to(working_dtype(state[name]))
            groups = [torch.tensor(cluster, device=exact.device) for cluster in self.clusters]
            new[name] = torch.stack([exact.index_select(dim, group).mean(dim) for group in groups], dim)
            if logarithm and self._is_bias(name):
                new[name] = new[name] + torch.tensor(sizes, device=exact.device).log().to(exact.dtype)
        return {name: tensor.to(state[name].dtype) for name, tensor in new.items()}

    def has_bias(self) -> bool:
        """Whether the router has a bias."""
        return any(self._is_bias(name) for name, _ in self.mixture.router)

    def _is_bias(self, name: str) -> bool:
        matrix = f"{name.removesuffix('bias')}weight"
        return name.endswith("bias") and any(other == matrix for other, _ in self.mixture.router)

    def _times(self, expert: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
        """The expert with its output scaled by a factor: outgoing weights and output bias."""
        sent = [member.tensor for member in self.hidden if member.role == "sum"]
        stems = tuple(part.removesuffix("weight") for part in sent)
        inside = {member.tensor for member in self.hidden}
        own = {part for part in expert if part in sent or (stems and part.startswith(stems) and part not in inside)}
        return {part: tensor * factor if part in own else tensor for part, tensor in expert.items()}


def _nearest(
    model: nn.Module,
    state: Mapping[str, Tensor],
    changed: Sequence[_Changed],
    attributes: Mapping[tuple[str, str], object],
    inputs: ExampleInputs,
) -> nn.Module:
    """The network with merged experts whose outputs are closest to the model's.

    How a merged expert has to be scaled depends on the router. If the scores of the picked experts sum to one: the
    mean of its members. If the scores of all experts do: less, because each score is larger now. If scores are not
    normalised: the sum of its members.
    """
    ways = [(0, False), *([(0, True)] if any(c.has_bias() for c in changed) else []), (1, False), (-1, False)]
    expected = outputs(copied(model), inputs)
    best: tuple[float, nn.Module] | None = None
    for power, logarithm in ways:
        new = {n: t for c in changed for n, t in c.tensors(state, power, logarithm).items()}
        small = rebuild(model, {**state, **new}, attributes)
        shorten(small, {c.mixture.name: len(c.clusters) for c in changed if c.mixture.keys})
        try:
            distance = mean_change([change(outputs(copied(small), inputs), expected)])
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the user's code may raise anything
            counts = ", ".join(f"{c.mixture.name}: {len(c.clusters)} of {c.mixture.count}" for c in changed)
            raise ValueError(
                f"with fewer experts ({counts}) the network does not run: {type(error).__name__}: {error}; a router "
                "that picks several needs as many experts, and the code must take their number from a tensor's shape "
                "or an attribute that ends in experts"
            ) from error
        if best is None or (distance is not None and distance < 0.99 * best[0]):
            best = math.inf if distance is None else distance, small
    assert best is not None, "there are ways"
    return best[1]


def _hidden(mixture: Mixture, groups: Sequence[Group]) -> tuple[Member, ...]:
    """Positions of an expert's hidden neurons in its parts; empty if they are not one group."""
    names = {mixture.tensor(part): part for part in mixture.parts}
    if mixture.keys:  # the first expert that the example inputs reach represents all
        for number in range(mixture.count):
            names = {mixture.tensor(part, number): part for part in mixture.parts}
            if any(member.tensor in names for group in groups for member in group.members):
                break
    inside = [g for g in groups if all(m.tensor in names and (mixture.keys or m.dim) for m in g.members)]
    if len(inside) != 1:
        return ()
    less = 0 if mixture.keys else 1  # a row of a stacked tensor has one dimension less
    return tuple(replace(m, tensor=names[m.tensor], dim=m.dim - less) for m in inside[0].members)


def _working(expert: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {part: t.to(working_dtype(t)) if t.is_floating_point() else t for part, t in expert.items()}


def _neurons(expert: Mapping[str, Tensor], hidden: Sequence[Member], role: str) -> list[Tensor]:
    """The incoming ("mean") or outgoing ("sum") weights of an expert's neurons, a tensor [n, values] for each part."""
    return [rows(expert[member.tensor], member.dim, member.index) for member in hidden if member.role == role]


def _sketch(expert: Mapping[str, Tensor], hidden: Sequence[Member]) -> Tensor:
    """An expert as a point: a random projection of the product of its outgoing and incoming weights.

    Random projections nearly preserve distances (Johnson and Lindenstrauss 1984).
    """
    inside = {member.tensor for member in hidden}
    others = [t.flatten() for part, t in expert.items() if part not in inside and t.is_floating_point()]
    if not hidden:
        return torch.cat(others)
    taken, sent = (torch.cat(_neurons(expert, hidden, role), dim=1) for role in ("mean", "sum"))
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(taken.shape[1], _DIRECTIONS, generator=generator, dtype=torch.float64)
    product = sent.T @ (taken @ (directions / _DIRECTIONS**0.5).to(taken))
    return torch.cat([product.flatten(), *others])


def _clusters(points: Tensor, count: int) -> list[list[int]]:
    """The numbers of the experts in each cluster, ordered by the first of each."""
    labels = ward_linkage(points).cut(count).tolist()
    return [[i for i, label in enumerate(labels) if label == one] for one in dict.fromkeys(labels)]


def _one(experts: Sequence[Mapping[str, Tensor]], hidden: Sequence[Member]) -> dict[str, Tensor]:
    """The merged expert: it approximates the mean of several experts with as many neurons as one of them.

    Tensors without neurons are averaged, and so is everything if an expert's neurons are not one group. Integer tensors
    (such as BatchNorm's counter of batches) are those of the first expert.
    """
    if len(experts) == 1:
        return dict(experts[0])
    merged = {
        part: torch.stack([expert[part] for expert in experts]).mean(0) if first.is_floating_point() else first
        for part, first in experts[0].items()
    }
    if not hidden:
        return merged
    taken = _together([_neurons(expert, hidden, "mean") for expert in experts])
    sent = [tensor / len(experts) for tensor in _together([_neurons(expert, hidden, "sum") for expert in experts])]
    masses = sum((tensor.square().sum(1) for tensor in sent), start=sent[0].new_zeros(()))
    masses = masses.clamp(min=torch.finfo(masses.dtype).eps * float(masses.max()) or 1.0)
    count = len(hidden[0].index)
    labels = ward_linkage(torch.cat(taken, dim=1), masses).cut(count).to(masses.device)
    total = add_rows(masses.new_zeros(count), 0, labels, masses)
    shares = (masses / total[labels])[:, None]
    centroids = iter([add_rows(t.new_zeros(count, t.shape[1]), 0, labels, t * shares) for t in taken])
    sums = iter([add_rows(t.new_zeros(count, t.shape[1]), 0, labels, t) for t in sent])
    for member in hidden:
        values = next(centroids if member.role == "mean" else sums)
        front = merged[member.tensor].movedim(member.dim, 0)  # a view
        front[member.index.to(front.device)] = values.reshape(*member.index.shape, *front.shape[1:])
    return merged


def _together(of_experts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The neurons of several experts, concatenated."""
    return [torch.cat(parts) for parts in zip(*of_experts, strict=True)]


@dataclass(frozen=True)
class _Fewer:
    """All mixtures of a model, with their merged experts.

    Attributes:
        changed: mixtures that get fewer experts.
        others: modules that only look like a mixture.
        entries: numbers of experts before and after, by the modules around them.
    """

    changed: Sequence[_Changed]
    others: Sequence[Lookalike]
    entries: Sequence[Entry]

    @staticmethod
    def found(model: nn.Module, example_inputs: ExampleInputs, experts: Experts) -> "_Fewer":
        """Find the mixtures of a model and merge their experts as requested."""
        groups, state = record(model, example_inputs).groups, tensors(model)
        mixtures, others = find_mixtures(model, example_inputs)
        kept = _kept(mixtures, others, experts)
        changed = [
            _Changed.made(mixture, count, state, _hidden(mixture, groups))
            for mixture, count in zip(mixtures, kept, strict=True)
            if count < mixture.count
        ]
        return _Fewer(changed, others, entries(mixtures, others, kept))

    def network(self, model: nn.Module, inputs: ExampleInputs) -> nn.Module:
        """The model with merged experts, scaled to be as close as possible on these inputs."""
        small = _nearest(model, tensors(model), self.changed, attributes(model, self.entries), inputs)
        set_configs(small, model, self.entries)
        set_mode_again(small)
        return small

    def told(self, model: str) -> list[str]:
        """Lines for the printed plan."""
        alone = [f"{other.name} is left alone: {other.why}" for other in self.others]
        return [*(changed.told(model) for changed in self.changed), *alone]

    def touched(self) -> set[str]:
        """Names of all tensors that may have changed."""
        return {name for changed in self.changed for name in changed.mixture.names()}


def _plan(model: nn.Module, changes: tuple[str, ...], before: Cost, after: Cost) -> Plan:
    """The plan that records the merging of experts; it extends the plan of an earlier compression."""
    origin = origin_of(model)
    if origin is None:
        return Plan((), (), before, after, changes)
    return replace(origin.plan, after=after, changes=(*origin.plan.changes, *changes))
