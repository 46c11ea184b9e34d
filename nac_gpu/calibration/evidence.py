"""Evidence: what is known about a model's neurons, either their activations or only their weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nac_gpu.calibration.activity import Activity
from nac_gpu.calibration.batches import Batches
from nac_gpu.calibration.curves import Curve, error_curve, inertia_curve
from nac_gpu.calibration.neurons import neuron_vectors
from nac_gpu.clustering.dendrogram import Dendrogram
from nac_gpu.clustering.linkage import ward_linkage
from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.kernels import MOST_SLOTS
from nac_gpu.tracing.graph import Group


@dataclass
class Evidence:
    """What is known about a model's neurons.

    Attributes:
        state: the model's tensors by name.
        batches: inputs on which the neurons were observed; empty if only the weights are known.
        judged: inputs that were kept aside: nothing is fitted to them; none if there are too few.
        activities: activations and outgoing weights, by the name of the group.
        source: one line for the plan and the report that says where the evidence is from.
        comparable: the activations are good enough to compare neurons, not only for compensation.
        synthetic: the inputs are synthetic.
        float32: the model is of another type, and was observed as a copy in float32: the batches are for that.
        failures: lines that say which steps failed that should have told more.
    """

    state: Mapping[str, Tensor]
    batches: Batches = ()
    judged: Batches = ()
    activities: dict[str, Activity] = field(default_factory=dict)
    source: str = ""
    comparable: bool = True
    synthetic: bool = False
    float32: bool = False
    failures: tuple[str, ...] = ()
    _trees: dict[str, Dendrogram] = field(default_factory=dict)
    _removed: dict[str, set[int]] = field(default_factory=dict)  # widths at which removal loses less

    def release(self) -> None:
        """Free what is known of the neurons, which takes more memory than a model: the inputs stay."""
        self.activities.clear()
        self._trees.clear()

    def points(self, group: Group) -> tuple[Tensor, Tensor | None]:
        """The group's neurons for clustering: points [n, d], and masses [n] or None."""
        activity = self.activities.get(group.name)
        if activity is not None and self.comparable:
            return activity.points()
        return neuron_vectors(self.state, group), None

    def tree(self, group: Group) -> Dendrogram:
        """The group's dendrogram by Ward's method."""
        self.cluster([group])
        return self._trees[group.name]

    def cluster(self, groups: Iterable[Group]) -> None:
        """Compute the missing dendrograms, those of small groups in one call, which is much faster on a GPU."""
        missing = [group for group in groups if group.name not in self._trees]
        small = [group for group in missing if group.size <= MOST_SLOTS]
        large = [[group] for group in missing if group.size > MOST_SLOTS]  # one by one, to save memory
        for together in filter(None, [small, *large]):
            points, masses = zip(*map(self.points, together), strict=True)
            self._trees |= zip((group.name for group in together), ward_linkage(points, masses), strict=True)

    def curves(self, groups: Sequence[Group], ranks: Ranks = ALONE) -> dict[str, Curve]:
        """The error curves of groups, by name; the ranks divide the groups among them."""
        found = {}
        self.cluster(ranks.own(groups))
        made = ranks.share(groups, lambda g: (self.curve(g), self.tree(g), self._removed.get(g.name, set())))
        for group, (curve, tree, removed) in zip(groups, made, strict=True):
            found[group.name], self._trees[group.name], self._removed[group.name] = curve, tree, removed
        return found

    def curve(self, group: Group) -> Curve:
        """The error of making the group smaller in the better way, by the number of neurons kept."""
        activity = self.activities.get(group.name)
        if activity is None:
            return inertia_curve(self.tree(group))
        merged, removed = (error_curve(cut, group.size, activity) for cut in (self.tree(group).cut, activity.removal))
        self._removed[group.name] = {kept for kept, error in merged.items() if removed[kept] < error}
        return {kept: min(error, removed[kept]) for kept, error in merged.items()}

    def likely(self, group: Group, kept: int) -> Tensor:
        """The labels of the better way, by the curve: int64 [n]; `kept` is one of its widths."""
        if kept in self._removed.get(group.name, ()):
            return self.activities[group.name].removal(kept)
        return self.tree(group).cut(kept)
