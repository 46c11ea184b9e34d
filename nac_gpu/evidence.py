"""What is known of a model's neurons: how they act, on calibration data or dreams, or only what their weights are."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from nac_gpu.activations import Activity, Batches, as_batches, observe, readings
from nac_gpu.agreement import check_arguments, union
from nac_gpu.budget import Curve, error_curve, inertia_curve
from nac_gpu.dendrogram import Dendrogram
from nac_gpu.distributed import ALONE, RankError, Ranks
from nac_gpu.dream import dream, has_statistics, why_not
from nac_gpu.forward import ExampleInputs, device_of
from nac_gpu.groups import Group
from nac_gpu.kernels import MOST_SLOTS
from nac_gpu.linkage import ward_linkage
from nac_gpu.neurons import neuron_vectors
from nac_gpu.opening import is_open
from nac_gpu.rebuild import tensors
from nac_gpu.tokens import Speaker
from nac_gpu.widths import Calibration


@dataclass
class Evidence:
    """What is known of a model's neurons.

    Attributes:
        state: the model's tensors by name.
        batches: inputs on which they were looked at; none if only the weights are known.
        activities: by the name of a group, how it is read.
        source: one line for people: where this is from.
        alike: neurons may be compared by their activities, not only be compensated by them.
    """

    state: Mapping[str, Tensor]
    batches: Batches = ()
    activities: Mapping[str, Activity] = field(default_factory=dict)
    source: str = ""
    alike: bool = True
    _trees: dict[str, Dendrogram] = field(default_factory=dict)

    def points(self, group: Group) -> tuple[Tensor, Tensor | None]:
        """The group's neurons for clustering: points [n, d], and masses [n] or None."""
        activity = self.activities.get(group.name)
        if activity is not None and self.alike:
            return activity.points()
        return neuron_vectors(self.state, group), None

    def tree(self, group: Group) -> Dendrogram:
        """The group's dendrogram by Ward's method."""
        self.cluster([group])
        return self._trees[group.name]

    def cluster(self, groups: Iterable[Group]) -> None:
        """Make the dendrograms that are still missing, those of small groups in one call: a GPU is quick then."""
        missing = [group for group in groups if group.name not in self._trees]
        small = [group for group in missing if group.size <= MOST_SLOTS]
        large = [[group] for group in missing if group.size > MOST_SLOTS]  # whose points take memory
        for together in filter(None, [small, *large]):
            points, masses = zip(*map(self.points, together), strict=True)
            self._trees |= zip((group.name for group in together), ward_linkage(points, masses), strict=True)

    def curves(self, groups: Sequence[Group], ranks: Ranks = ALONE) -> dict[str, Curve]:
        """The curves of groups, which the ranks divide among them."""
        found = {}
        self.cluster(ranks.own(groups))
        made = ranks.share(groups, lambda group: (self.curve(group), self.tree(group)))
        for group, (curve, tree) in zip(groups, made, strict=True):
            found[group.name], self._trees[group.name] = curve, tree
        return found

    def curve(self, group: Group) -> Curve:
        """The error of merging the group, by the number of neurons that are kept."""
        activity = self.activities.get(group.name)
        if activity is not None:
            return error_curve(self.tree(group).cut, group.size, activity)
        return inertia_curve(self.tree(group))


def gather(
    model: nn.Module,
    example_inputs: ExampleInputs,
    groups: Sequence[Group],
    calibration: Calibration,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> Evidence:
    """Find out what can be known of the neurons of these groups.

    Args:
        model: not changed.
        example_inputs: what it is called with.
        groups: the groups.
        calibration: batches of inputs; `"dream"` makes some up where that can be done (see `nac_gpu.dream` and
            `nac_gpu.tokens`), `"none"` leaves it at the weights.
        seed: of dreams.
        ranks: the processes that work together; calibration data may be each one's own part.

    Raises:
        TypeError: calibration data of the wrong kind.
        ValueError: no calibration data, data with activations that are not finite, or an unknown word.
        RuntimeError: the forward pass fails on the calibration data.
        RankError: another rank failed, or was lost.
    """
    state = tensors(model)
    check_arguments(ranks, {"calibration": calibration if isinstance(calibration, str) else "batches"})
    if isinstance(calibration, str):
        if calibration not in ("dream", "none"):
            raise ValueError(f"calibration={calibration!r}, expected batches of inputs, 'dream' or 'none'")
        speaker = None
        reason = "calibration='none'" if calibration == "none" else why_not(model, example_inputs)
        if calibration == "dream" and is_open(model):
            reason = "its weights are in files"
        elif calibration == "dream" and reason is not None:
            speaker = Speaker(model, example_inputs)
        if reason is not None and (speaker is None or not speaker.places):
            return Evidence(state, source=f"neurons are compared by their weights, without compensation: {reason}")
        batches: list[ExampleInputs]
        if speaker is not None:
            batches, known = speaker.batches(seed, ranks), speaker.speaks()
            source = "of tokens that the model itself says" if known else "of random tokens"
        else:
            assert isinstance(example_inputs, Tensor), "else there are no dreams"
            batches = [*dream(model, example_inputs, seed=seed, ranks=ranks)]
            known = has_statistics(model)
            source = f"dreamed up from {'the statistics of BatchNorm' if known else 'the weights of the first layer'}"
    elif is_open(model):
        raise ValueError(
            "expected calibration='none' for a model of nac_gpu.open_model: its weights are in files, its neurons are "
            "compared by their weights"
        )
    else:
        batches = union(list(as_batches(calibration, example_inputs, device_of(model))), ranks)
        source, known = "of calibration data", True
    try:
        activities = observe(model, state, groups, batches, ranks)
    except RankError:
        raise
    except (RuntimeError, TypeError) as error:
        raise RuntimeError(f"the forward pass fails on the calibration data: {error}") from error
    count = sum(len(batch) if isinstance(batch, Tensor) else 1 for batch in batches)
    unit = "inputs" if all(isinstance(batch, Tensor) for batch in batches) else "batches"
    known_readers = {reading.member.tensor for group in groups for reading in readings(model, group)}
    others = [m.tensor for group in groups for m in group.members if m.role == "sum" and m.tensor not in known_readers]
    line = f"activations: {count} {unit} {source}"
    if others:
        line += f"; what these read is not compensated: {', '.join(dict.fromkeys(others))}"
    return Evidence(state, batches, activities, line, known)
