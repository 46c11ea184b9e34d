"""Neurons that compute the same merge without a change, whatever their weights and their BatchNorm hold."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nac_gpu as nac
from nac_gpu.merging.centroids import Deviation, Merger
from nac_gpu.merging.copies import copy_neurons
from nac_gpu.network.copying import rebuild
from nac_gpu.network.state import tensors
from nac_gpu.tracing.graph import Group
from nac_gpu.tracing.trace import record

N, K = 12, 5  # neurons and clusters


def rows(layer: nn.Module) -> Tensor:
    """The weight with its neurons first."""
    return layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight


def _scaled(factor: float) -> Callable[[nn.Module, nn.Module, int], None]:
    def scale(layer: nn.Module, norm: nn.Module, at: int) -> None:
        rows(layer)[at] *= factor

    return scale


def _set(name: str, value: float) -> Callable[[nn.Module, nn.Module, int], None]:
    def put(layer: nn.Module, norm: nn.Module, at: int) -> None:
        tensor = getattr(norm, name)
        if tensor is not None:
            tensor[at] = value

    return put


KINDS: dict[str, Callable[[nn.Module, nn.Module, int], None]] = {
    "ordinary": _scaled(1.0),
    "dead": _scaled(0.0),
    "tiny": _scaled(1e-30),
    "huge": _scaled(1e30),
    "still": _set("running_var", 0.0),
    "loud": _set("running_var", 1e30),
    "off": _set("weight", 0.0),
    "negative": _set("weight", -0.7),
    "far": _set("running_mean", 1e4),
}
LAYERS = {
    "conv": lambda bias: nn.Conv2d(3, N, 3, bias=bias),
    "transposed": lambda bias: nn.ConvTranspose2d(3, N, 3, bias=bias),
    "linear": lambda bias: nn.Linear(7, N, bias=bias),
}


def built(layer: str, bias: bool, affine: bool, track: bool, kinds: list[str], seed: int) -> tuple[nn.Module, Tensor]:
    """A layer with BatchNorm and a consumer, in float64; its first K neurons are of these kinds."""
    torch.manual_seed(seed)
    first = LAYERS[layer](bias)
    norm = (nn.BatchNorm1d if layer == "linear" else nn.BatchNorm2d)(N, affine=affine, track_running_stats=track)
    last = nn.Linear(N, 3) if layer == "linear" else nn.Conv2d(N, 3, 1)
    model = nn.Sequential(first, norm, nn.ReLU(), last).double().eval()
    with torch.no_grad():
        if affine:
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
        if track:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        for at, kind in enumerate(kinds):
            KINDS[kind](first, norm, at)
    return model, torch.randn(4, 7) if layer == "linear" else torch.randn(4, 3, 5, 5)


@cache
def group_of(layer: str, bias: bool, affine: bool, track: bool) -> Group:
    """The neurons of the first layer of `built`."""
    model, inputs = built(layer, bias, affine, track, [], seed=0)
    return record(model, inputs.double()).groups[0]


def merged(state: dict[str, Tensor], group: Group, labels: Tensor, rule: Deviation, masses: bool) -> dict[str, Tensor]:
    merger = Merger(state, rule)
    merger.merge_made(group, labels, torch.rand(group.size) + 0.1 if masses else None)
    merger.merge_read(group, labels)
    return merger.finish()


def as_type(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors in another floating type, with what is too large for it at its end."""
    most = torch.finfo(dtype).max
    return {
        name: value.clamp(-most, most).to(dtype) if value.is_floating_point() else value
        for name, value in state.items()
    }


networks = st.tuples(
    st.sampled_from(list(LAYERS)),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.lists(st.sampled_from(list(KINDS)), min_size=K, max_size=K),
    st.integers(0, 2**31),
)
rules = st.sampled_from(["restored", "centroid"])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=60, deadline=None)
@given(made=networks, dtype=st.sampled_from(DTYPES), rule=rules, masses=st.booleans(), removed=st.booleans())
def test_copies_of_any_neurons_keep_every_bit(
    made: tuple[str, bool, bool, bool, list[str], int], dtype: torch.dtype, rule: Deviation, masses: bool, removed: bool
) -> None:
    model, _ = built(*made)
    group = group_of(*made[:4])
    others = torch.randint(K, (N - K,), generator=torch.Generator().manual_seed(made[-1]))
    labels = torch.cat([torch.arange(K), others])  # the first K neurons are those of the kinds
    state = as_type(copy_neurons(tensors(model), group, labels), dtype)
    if removed:
        labels[N - 1] = -1
    small = merged(state, group, labels, rule, masses)
    for member in group.members:
        before, after = state[member.tensor].movedim(member.dim, 0), small[member.tensor].movedim(member.dim, 0)
        if member.role == "mean":
            assert torch.equal(after, before[:K])
            continue
        summed = (labels == torch.arange(K)[:, None]).double() @ before.double().flatten(1)
        assert torch.allclose(after.double().flatten(1), summed, rtol=8 * torch.finfo(dtype).eps, atol=1e-6)


def channel(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of BatchNorm [channels, values], and the size of the terms that they are the sum of, [channels]."""
    norm = model[1]
    with torch.no_grad():
        raw, values = model[0](inputs).transpose(0, 1).flatten(1), model[:2](inputs).transpose(0, 1).flatten(1)
        slope = (1 if norm.weight is None else norm.weight.abs()) / torch.sqrt(norm.running_var + norm.eps)
        terms = slope * (raw.abs().amax(1) + norm.running_mean.abs())
    return values, terms + (0 if norm.bias is None else norm.bias.abs())


def make_twins(model: nn.Module, kinds: list[str], labels: Tensor, factors: list[float]) -> None:
    """Make all neurons of a cluster multiples of its first before BatchNorm, and equal after it."""
    first, norm = model[0], model[1]
    with torch.no_grad():
        for at in range(K, N):
            home, c = int(labels[at]), factors[at - K]
            slope = norm.weight[home] / torch.sqrt(norm.running_var[home] + norm.eps)
            rows(first)[at], norm.running_mean[at] = c * rows(first)[home], c * norm.running_mean[home]
            if first.bias is not None:
                first.bias[at] = c * first.bias[home]
            norm.bias[at], norm.running_var[at] = norm.bias[home], c * c * norm.running_var[home]
            norm.weight[at] = slope / c * torch.sqrt(norm.running_var[at] + norm.eps)


@settings(max_examples=60, deadline=None)
@given(
    made=networks,
    factors=st.lists(st.sampled_from([1.0, -1.0, 3.0, -0.4, 100.0]), min_size=N - K, max_size=N - K),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    rule=rules,
    masses=st.booleans(),
)
def test_multiples_that_batchnorm_makes_equal_merge_with_no_change(
    made: tuple[str, bool, bool, bool, list[str], int],
    factors: list[float],
    dtype: torch.dtype,
    rule: Deviation,
    masses: bool,
) -> None:
    model, inputs = built(*made[:2], True, True, *made[4:])
    labels = torch.cat([torch.arange(K), torch.randint(K, (N - K,))])
    make_twins(model, made[4], labels, factors)
    model = model.to(dtype)
    group = group_of(*made[:2], True, True)
    small = rebuild(model, merged(tensors(model), group, labels, rule, masses)).double()
    before, terms = channel(model.double(), inputs.double())
    after, _ = channel(small, inputs.double())
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert bool(((after - before[:K]).abs().amax(1) <= tolerance * terms[:K]).all())


@pytest.mark.parametrize("rule", ["restored", "centroid"])
@pytest.mark.parametrize("affine", [True, False])
def test_constants_merge_into_their_mean(affine: bool, rule: Deviation) -> None:
    """Filters of zeros whose BatchNorms hold what is left of earlier training: nothing of it may be divided by."""
    model, inputs = built("conv", True, affine, True, ["dead"] * K, seed=0)
    labels = torch.tensor([0, 0, 0, 1, 1, *range(2, 9)])
    group = group_of("conv", True, affine, True)
    small = rebuild(model, merged(tensors(model), group, labels, rule, masses=False))
    before, after = channel(model, inputs.double())[0], channel(small, inputs.double())[0]
    for cluster in range(2):
        assert torch.allclose(after[cluster], before[labels == cluster].mean(0), rtol=1e-10)


def test_a_dead_filter_takes_no_part_in_the_variance_of_a_living_one() -> None:
    model, _ = built("conv", False, True, True, ["ordinary", "dead"], seed=0)
    group = group_of("conv", False, True, True)
    labels = torch.tensor([0, 0, *range(1, N - 1)])
    small = rebuild(model, merged(tensors(model), group, labels, "centroid", masses=False))
    ratio = small[0].weight[0].norm() / model[0].weight[0].norm()
    assert torch.allclose(small[1].running_var[0], ratio**2 * model[1].running_var[0])


class Preactivated(nn.Module):
    """A BatchNorm over the sum of two layers, which belongs to neither; with groups of two channels, or heads."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=groups)
        self.head = nn.Linear(8 * 9, 2)  # reads blocks of 9 columns

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.grouped(torch.relu(self.norm(self.a(x) + self.b(x)))).flatten(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("groups", [1, 4])
def test_copies_of_units_and_of_norms_without_a_producer(groups: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, inputs = Preactivated(groups).to(dtype).eval(), torch.randn(2, 3, 5, 5, dtype=dtype)
    with torch.no_grad():
        model.norm.running_mean.uniform_(-300, 300)
        model.norm.running_var.zero_()
    state = tensors(model)
    labels = [torch.arange(g.size).clamp_max(g.size // 2) for g in record(model, inputs).groups]
    groups_found = record(model, inputs).groups
    for group, chosen in zip(groups_found, labels, strict=True):
        state = copy_neurons(state, group, chosen)
    merger = Merger(state)
    for group, chosen in zip(groups_found, labels, strict=True):
        merger.merge(group, chosen)
    small = merger.finish()
    assert torch.equal(small["norm.bias"], state["norm.bias"][: len(small["norm.bias"])])
    expected, found = rebuild(model, state)(inputs), rebuild(model, small, _groups(model, small))(inputs)
    assert (found - expected).abs().max() <= (1e-11 if dtype == torch.float64 else 1e-5) * expected.abs().max()


def _groups(model: Preactivated, state: dict[str, Tensor]) -> dict[tuple[str, str], object]:
    left = state["grouped.weight"].shape[0] * model.grouped.groups // 8
    return {("grouped", "groups"): left} if model.grouped.groups > 1 else {}


def test_tensors_of_several_types_in_one_group() -> None:
    model, _ = built("conv", True, True, True, ["dead", "still"], seed=0)
    model.float()[1].double()
    group = group_of("conv", True, True, True)
    state = copy_neurons(tensors(model), group, torch.arange(N) % K)
    small = merged(state, group, torch.arange(N) % K, "restored", masses=True)
    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        assert small[name].dtype == state[name].dtype
        assert torch.equal(small[name], state[name][:K])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rule", ["restored", "centroid", "compensated"])
def test_compress_finds_dead_filters_and_copies(rule: nac.Rule, dtype: torch.dtype) -> None:
    """A mask of structured pruning, and copies of a neuron that BatchNorm turns upside down."""
    torch.manual_seed(1)
    model, _ = built("conv", False, True, True, [], seed=2)
    with torch.no_grad():
        model[0].weight[6:] = 0
        model[1].running_mean[6:] = -0.3
        model[1].weight[6:], model[1].bias[6:], model[1].running_var[6:] = 1.0, 0.2, 0.9
        model[1].weight[0] *= -1
        for tensor in (model[0].weight, model[1].weight, model[1].bias, model[1].running_mean, model[1].running_var):
            tensor[1:3] = tensor[0]
    model = model.to(dtype)
    batches = [torch.randn(16, 3, 5, 5, dtype=dtype) for _ in range(2)]
    small = nac.compress(model, batches[0], width={"0": 5}, rule=rule, calibration=batches)
    with torch.no_grad():
        expected, found = model(batches[1]), small(batches[1])
    assert (found - expected).abs().max() <= (1e-8 if dtype == torch.float64 else 1e-5) * expected.abs().max()
