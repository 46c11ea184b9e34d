"""Compensation: exact where it can be, better where it cannot, and nothing else changes."""

import math
from collections.abc import Iterator

import pytest
import torch
from networks import NETWORKS, network
from torch import Tensor, nn

import nac_gpu as nac
from nac_gpu.calibration.batches import as_batches
from nac_gpu.calibration.gathering import gather
from nac_gpu.calibration.moments import Moments
from nac_gpu.calibration.readings import readings
from nac_gpu.distributed.ranks import ALONE
from nac_gpu.merging.compensation import Compensator
from nac_gpu.merging.consumers import Assigned, _convolved
from nac_gpu.merging.copies import copy_neurons, random_labels
from nac_gpu.network.comparing import outputs, relative_error
from nac_gpu.network.copying import rebuild
from nac_gpu.network.state import tensors
from nac_gpu.tracing.trace import record


def lively_batches(inputs: Tensor, count: int = 4, size: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, *inputs.shape[1:], generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_merge_exactly_with_compensation(name: str) -> None:
    model, inputs = network(name)
    model, inputs = model.double(), inputs.double()
    graph = record(model, inputs)
    generator = torch.Generator().manual_seed(1)
    state = tensors(model)
    labels = {}
    for group in graph.groups:
        labels[group.size, group.name] = random_labels(group.size, max(1, group.size // 2), generator)
        state = copy_neurons(state, group, labels[group.size, group.name])
    copied = rebuild(model, state)
    order = iter(labels.values())

    def chosen(points: Tensor, k: int, *, weights: Tensor | None = None, seed: int = 0) -> Tensor:
        return next(order)

    width = {group.name: max(1, group.size // 2) for group in graph.groups}
    small = nac.compress(copied, inputs, width=width, method=chosen, calibration=lively_batches(inputs))
    assert relative_error(outputs(small, inputs), outputs(copied, inputs)) < 1e-8


@pytest.mark.parametrize("name", ["cnn", "residual"])
def test_what_is_kept_between_repeated_merges_changes_nothing(name: str) -> None:
    """Every group at three widths, each from the original again: the bits are those of a compensator for one merge."""
    model, inputs = network(name)
    graph = record(model, inputs)
    batches = [batch.float() for batch in lively_batches(inputs, 2, 8)]
    activities = gather(model, inputs, graph.groups, batches).activities
    together = Compensator(model, graph, batches, activities)
    for group in graph.groups[:4]:
        for kept in {max(1, group.size // part) for part in (2, 3, 4)}:
            labels = torch.arange(group.size) % kept
            together.start()
            together.merge(group, labels)
            alone = Compensator(model, graph, batches, activities)
            alone.merge(group, labels)
            assert all(torch.equal(value, alone.state[tensor]) for tensor, value in together.state.items())


def test_the_best_of_several_ways_is_taken_as_if_it_was_the_only_one() -> None:
    """Whatever was tried before it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3)).double()
    with torch.no_grad():
        model[0].weight[6:] = model[0].weight[:6]
        model[0].bias[6:] = model[0].bias[:6]
    batches = [torch.randn(32, 8, dtype=torch.float64) for _ in range(4)]
    graph = record(model, batches[0])
    activities = gather(model, batches[0], graph.groups, batches).activities
    first, second = graph.groups
    copies, wrong = torch.arange(12) % 6, torch.arange(12) // 2
    removal = activities[second.name].removal(5)
    several = Compensator(model, graph, batches, activities)
    assert several.merge(first, wrong, copies, wrong) == 1
    taken = several.merge(second, torch.arange(10) // 2, removal)
    alone = Compensator(model, graph, batches, activities)
    alone.merge(first, copies)
    alone.merge(second, (torch.arange(10) // 2, removal)[taken])
    assert all(torch.equal(value, alone.finish()[name]) for name, value in several.finish().items())


def test_where_neurons_are_only_removed_what_was_observed_tells_as_much_as_passes() -> None:
    """Consumers with one value a neuron and with several, with a bias and without; no sample is of a huge norm."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *[nn.Conv2d(1, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 7, 1), nn.Sigmoid(), nn.Flatten()],
        *[nn.Linear(28, 9, bias=False), nn.Sigmoid(), nn.Linear(9, 3)],
    ).double()
    batches = [torch.randn(16, 1, 4, 4, dtype=torch.float64) for _ in range(4)]
    graph = record(model, batches[0])
    evidence = gather(model, batches[0], graph.groups, batches)
    compensator = Compensator(model, graph, evidence.batches, evidence.activities, refit="alone")
    for group in graph.groups:
        activity = evidence.activities[group.name]
        assert activity.values
        assigned = Assigned(group, activity.removal(group.size // 2))
        compensator.start()
        compensator.merger.merge_made(group, assigned.labels, activity.masses())
        whole = dict(compensator.state)
        compensator.merger.merge_read(group, assigned.labels)
        found = {reading.layer: reading for reading in readings(model, group)}
        known = compensator._known(assigned, found, whole)
        passes = compensator._summed(assigned, found, whole, ALONE)
        for layer, one in known.items():
            for name in ("values", "errors", "neurons", "missing"):
                mine, theirs = (
                    Moments.total([getattr(terms, name) for terms in c[layer].total]) for c in (known, passes)
                )
                assert (mine.count > 0) == (theirs.count > 0)
                if mine.count:
                    tolerance = 1e-5 * float(theirs.second.abs().max())
                    assert torch.allclose(mine.second, theirs.second, rtol=0, atol=tolerance)
                    assert torch.allclose(mine.covariance, theirs.covariance, rtol=0, atol=tolerance)
            assert sum(terms.energy for terms in one.total) == pytest.approx(
                sum(terms.energy for terms in passes[layer].total), rel=1e-5
            )


def test_a_neuron_counts_in_its_centroid_as_much_as_its_readers_make_of_it() -> None:
    """One that next to nobody hears leaves the other of its cluster as it is."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 3)).double()
    with torch.no_grad():
        model[2].weight[:, 1] *= 1e-3
    x = torch.randn(256, 6, dtype=torch.float64)
    small = nac.compress(model, x[:1], width={"0": 1}, calibration=[x], refine=0)
    assert torch.allclose(small[0].weight[0], model[0].weight[0], atol=1e-4)
    plain = nac.compress(model, x[:1], width={"0": 1}, rule="restored")
    assert torch.allclose(plain[0].weight[0], model[0].weight.mean(0))


@pytest.mark.parametrize("name", ["cnn", "vgg16", "residual", "conv1d", "conv3d", "sequence"])
def test_the_same_clusters_lose_less_on_inputs_that_were_not_seen(name: str) -> None:
    model, inputs = network(name)
    model = model.double()
    batches = lively_batches(inputs, 12, 32)
    seen, new = batches[:8], batches[8:]

    def error(small: nn.Module) -> float:
        return sum(float((a - b).square().sum()) for x in new for a, b in [(small(x), model(x))])

    with torch.no_grad():
        with_it = error(nac.compress(model, inputs.double(), width=0.6, calibration=seen, neurons="folded"))
        without = error(nac.compress(model, inputs.double(), width=0.6, rule="restored"))
    assert with_it < 0.8 * without


class Constant(nn.Module):
    """Half of the hidden neurons do not depend on the input."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        layer, norm = (nn.Linear, nn.BatchNorm1d) if kind == "linear" else (nn.Conv2d, nn.BatchNorm2d)
        size = () if kind == "linear" else (3,)
        self.first = layer(4, 8, *size).double()
        self.second = layer(8, 6, *size, bias=False).double()
        self.norm = norm(6).double()
        self.last = layer(6, 2, *size).double()
        with torch.no_grad():
            self.first.weight[4:] = 0
            self.first.bias.uniform_(0.5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.second(self.first(x).relu())))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_constant_neurons_go_to_bias_or_running_mean(kind: str) -> None:
    torch.manual_seed(0)
    model = Constant(kind).eval()
    inputs = torch.randn(8, 4, *(() if kind == "linear" else (9, 9)), dtype=torch.float64)

    def first_half(points: Tensor, k: int, *, weights: Tensor | None = None, seed: int = 0) -> Tensor:
        return torch.tensor([0, 1, 2, 3, -1, -1, -1, -1])

    small = nac.compress(model, inputs, width={"first": 4}, method=first_half, calibration=[inputs])
    assert relative_error(outputs(small, inputs), outputs(model, inputs)) < 1e-8
    assert not torch.allclose(small.norm.running_mean, model.norm.running_mean)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 4, 3, padding=2, dilation=2),
        nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0)),
        nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect"),
        nn.Conv3d(3, 4, 2, stride=2),
    ],
    ids=["1d-dilated", "2d-strided", "2d-same-reflect", "3d"],
)
@torch.no_grad()
def test_values_times_weights_are_what_a_convolution_makes(layer: nn.modules.conv._ConvNd) -> None:
    inputs = torch.randn(2, 3, *(7,) * len(layer.kernel_size))
    index = torch.tensor([[2], [0], [1]])
    weight = layer.weight[:, index.flatten()].unsqueeze(2)
    made = layer(inputs) - layer.bias.view(-1, *(1,) * len(layer.kernel_size))  # type: ignore[union-attr]
    expected = made.movedim(1, -1).flatten(0, -2)
    _, found = _convolved(layer, inputs, index, weight, 10**6)
    assert torch.allclose(found, expected, atol=1e-5)
    values, fewer = _convolved(layer, inputs, index, weight, 8)
    assert len(values) == len(fewer) < len(expected)
    distances = torch.cdist(fewer, expected).min(1).values
    assert float(distances.max()) < 1e-2


def test_moments_of_large_means_and_small_deviations() -> None:
    a = 1000 + 0.01 * torch.randn(500, 3)
    moments, taken = Moments(), Moments()
    taken.take(Moments())
    for part in a.split(50):
        moments.add(part, part)
        own = Moments()
        own.add(part, part)
        taken.take(own)
    taken.take(Moments())
    assert torch.allclose(taken.covariance, moments.covariance, rtol=1e-4)
    assert torch.allclose(taken.second, moments.second)
    assert torch.allclose(moments.covariance, a.double().T.cov(correction=0), rtol=1e-3)
    assert torch.allclose(moments.second, a.double().T @ a.double() / 500)
    assert torch.allclose(moments.means[0], a.double().mean(0))


def test_readings_are_plain_layers_only() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1))
    (group,) = record(model, torch.randn(1, 3, 5, 5)).groups
    assert [reading.layer for reading in readings(model, group)] == ["2"]


def test_calibration_takes_loaders_pairs_and_generators() -> None:
    model, inputs = network("cnn")
    pairs = torch.utils.data.TensorDataset(torch.randn(32, 1, 28, 28), torch.zeros(32))
    loader = torch.utils.data.DataLoader(pairs, batch_size=16)

    def once() -> Iterator[Tensor]:
        yield from (images for images, _ in loader)

    from_pairs, from_generator = (
        nac.compress(model, inputs, width=0.5, calibration=calibration) for calibration in (loader, once())
    )
    assert all(torch.equal(a, b) for a, b in zip(from_pairs.parameters(), from_generator.parameters(), strict=True))
    mapping = list(as_batches([{"x": inputs}], {"x": inputs}, torch.device("cpu")))
    assert torch.equal(mapping[0]["x"], inputs)


def test_misuse_of_calibration() -> None:
    model, inputs = network("cnn")
    with pytest.raises(TypeError, match="calibration is a tensor, expected batches: a list of inputs"):
        nac.compress(model, inputs, width=0.5, calibration=inputs)
    with pytest.raises(TypeError, match="batch 0 of the calibration data is str, expected a tensor"):
        nac.compress(model, inputs, width=0.5, calibration=["images"])
    with pytest.raises(ValueError, match="the calibration data has no batch"):
        nac.compress(model, inputs, width=0.5, calibration=[])
    with pytest.raises(ValueError, match="calibration='dreams', expected batches of inputs, 'dream' or 'none'"):
        nac.compress(model, inputs, width=0.5, calibration="dreams")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="the forward pass fails on the calibration data"):
        nac.compress(model, inputs, width=0.5, calibration=[torch.randn(2, 1, 5, 5)])
    with pytest.raises(ValueError, match="reads activations that are not finite on the calibration data"):
        nac.compress(model, inputs, width=0.5, calibration=[inputs * math.nan])
