"""Budgets: what is asked for is met, costs are exact, and the widths are good ones."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, network
from torch import Tensor, nn

import nac_gpu as nac
from nac_gpu.calibration.activity import Activity
from nac_gpu.calibration.curves import error_at, error_curve, inertia_curve, widths_to_try
from nac_gpu.calibration.gathering import gather
from nac_gpu.calibration.moments import Part
from nac_gpu.planning.allocation import Sizes, allocate
from nac_gpu.planning.request import Limits, Request
from nac_gpu.planning.sensitivity import _through
from nac_gpu.tracing.trace import record


def mlp(*widths: int) -> nn.Module:
    torch.manual_seed(0)
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*(layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU())))[:-1]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", [0, 1])
def test_costs_follow_from_the_shapes(name: str, seed: int) -> None:
    model, inputs = network(name)
    graph = record(model, inputs)
    generator = torch.Generator().manual_seed(seed)
    widths = [int(torch.randint(1, group.size + 1, (), generator=generator)) for group in graph.groups]
    sizes = Sizes(graph.groups, {n: p.shape for n, p in model.named_parameters()}, graph.operations, graph.flops)
    plan = nac.plan(model, inputs, width={g.name: w for g, w in zip(graph.groups, widths, strict=True)})
    parameters, flops = sizes.cost(torch.tensor(widths, dtype=torch.float64)).tolist()
    assert (round(parameters), round(flops)) == (plan.after.parameters, plan.after.flops)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("asked", [{"params": 0.5}, {"flops": 0.4}, {"params": 0.6, "flops": 0.6}], ids=str)
def test_budgets_are_met(name: str, asked: dict[str, float]) -> None:
    model, inputs = network(name)
    plan = nac.plan(model, inputs, calibration="none", **asked)
    used = {
        "params": plan.after.parameters / plan.before.parameters,
        "flops": plan.after.flops / plan.before.flops,
    }
    assert all(used[key] <= share for key, share in asked.items())
    one = max(  # what one neuron more would cost, of the group that costs least
        min(g.parameters_before / g.before / plan.before.parameters for g in plan.groups if g.after < g.before), 0.01
    )
    assert max(used[key] / share for key, share in asked.items()) >= 1 - max(0.01, one / min(asked.values()))


def test_numbers_multiples_limits_and_fixed_widths() -> None:
    model, inputs = network("vgg16")
    plan = nac.plan(model, inputs, params=100_000, calibration="none")
    assert 99_000 <= plan.after.parameters <= 100_000
    plan = nac.plan(model, inputs, params=0.3, multiple_of=4, calibration="none")
    assert all(width % 4 == 0 for width in plan.widths.values())
    plan = nac.plan(
        model,
        inputs,
        params=0.3,
        limits={"classifier.*": (100, 200), "features.0": (0.5, 1.0)},
        width={"features.3": 7},
        calibration="none",
    )
    assert all(100 <= plan.widths[name] <= 200 for name in ("classifier.0", "classifier.3"))
    assert plan.widths["features.0"] >= 4
    assert plan.widths["features.3"] == 7
    plan = nac.plan(model, inputs, params=0.9, width=0.5, calibration="none")
    assert all(group.after <= round(group.before / 2) for group in plan.groups)


@pytest.mark.parametrize("narrow", [3, 4, 8])
def test_a_layer_narrower_than_the_multiple_keeps_its_neurons(narrow: int) -> None:
    model, inputs = mlp(20, narrow, 70, 3), torch.randn(4, 20)
    plan = nac.plan(model, inputs, params=0.5, multiple_of=8, calibration="none")
    assert plan.widths["0"] == narrow
    assert plan.widths["2"] % 8 == 0
    asked = nac.plan(model, inputs, params=0.5, multiple_of=8, limits={"0": (1, 2)}, calibration="none").widths
    assert asked["0"] <= 2
    asked = nac.plan(model, inputs, params=0.5, multiple_of=8, width={"0": 2}, calibration="none").widths
    assert asked["0"] == 2
    asked = nac.plan(model, inputs, params=0.5, multiple_of=8, width=0.5, calibration="none").widths
    assert asked["0"] == round(narrow / 2)
    assert asked["2"] == 35 or asked["2"] % 8 == 0  # the most that width= allows


def test_widths_grow_from_a_limit_to_a_multiple() -> None:
    for share in (0.3, 0.4, 0.5, 0.6, 0.7):
        widths = nac.plan(
            mlp(20, 61, 61, 3),
            torch.randn(4, 20),
            params=share,
            multiple_of=8,
            limits={"*": (5, 59)},
            calibration="none",
        ).widths
        assert all(width % 8 == 0 or width in (5, 59) for width in widths.values()), widths


def test_a_multiple_that_the_budget_does_not_allow_is_halved() -> None:
    model, inputs = mlp(20, 4, 64, 3), torch.randn(4, 20)
    plan = nac.plan(model, inputs, params=0.2, multiple_of=8, calibration="none")
    assert plan.widths == {"0": 4, "2": 4}
    assert "cannot be met with multiples of 8 neurons: widths are multiples of 4" in str(plan)
    plan = nac.plan(model, inputs, params=0.1, multiple_of=8, calibration="none")
    assert plan.after.parameters <= 0.1 * plan.before.parameters
    assert "widths are multiples of 2" in str(plan)
    assert "multiples of" not in str(nac.plan(model, inputs, params=0.3, multiple_of=8, calibration="none"))
    with pytest.raises(ValueError, match=r"smallest possible is 0\.0484: one neuron is left in each group"):
        nac.plan(model, inputs, params=0.04, multiple_of=8, calibration="none")


class Heads(nn.Module):
    """Four heads, written into the code: channels of the heads are merged in place of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 120) for _ in range(3))
        self.o = nn.Linear(120, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o((q @ k.transpose(2, 3)).softmax(-1).matmul(v).transpose(1, 2).flatten(2))


def test_channels_in_place_of_units_are_multiples_too() -> None:
    plan = nac.plan(Heads(), torch.randn(2, 5, 12), params=0.8, multiple_of=8, calibration="none")
    assert plan.widths == {"v": 8}


NUMBERS = [np.int64, np.int32, np.uint8, torch.tensor, np.array, int]


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_of_other_libraries_are_numbers(number: Callable[[int], Any]) -> None:
    model, inputs = mlp(6, 16, 24, 3), torch.randn(4, 6)
    plan = nac.plan(model, inputs, width={"0": number(8), "2": np.float32(0.5)}, seed=number(3), calibration="none")
    assert plan.widths == {"0": 8, "2": 12}
    assert nac.Plan.from_json(plan.to_json()) == plan
    asked = {"params": number(250), "multiple_of": number(4), "limits": {"0": (number(4), torch.tensor(0.5))}}
    plan = nac.plan(model, inputs, **asked, calibration="none")
    assert plan == nac.plan(model, inputs, params=250, multiple_of=4, limits={"0": (4, 0.5)}, calibration="none")
    assert nac.Plan.from_json(plan.to_json()) == plan
    request = Request(**asked, seed=number(1))
    assert repr(request) == repr(Request(params=250, multiple_of=4, limits={"0": (4, 0.5)}, seed=1))
    small = nac.compress(model, inputs, width=np.float64(0.5), refine=number(0), seed=number(1), calibration="none")
    assert small[0].out_features == 8


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"width": True}, r"width=True, expected a share"),
        ({"width": "0.5"}, r"width='0.5', expected a share"),
        ({"width": [8, 8]}, r"width=\(8, 8\), expected a share"),
        ({"width": {0: 8}}, r"width= names a layer 0, expected its name in the model, such as '0'"),
        ({"width": {"0": np.True_}}, r"0: width is True"),
        ({"width": {"0": torch.tensor([8])}}, r"0: width is tensor"),
        ({"params": np.True_}, r"params=True, expected the share"),
        ({"params": 0.5, "limits": 4}, r"limits=4, expected a mapping"),
        ({"params": 0.5, "multiple_of": 2.0}, r"multiple_of=2\.0, expected at least 1"),
        ({"params": 0.5, "multiple_of": True}, r"multiple_of=True, expected at least 1"),
        ({"width": 0.5, "seed": 1.5}, r"seed=1\.5, expected an integer"),
        ({"width": 0.5, "seed": "a"}, r"seed='a', expected an integer"),
        ({"width": 0.5, "seed": 2**64}, r"seed=18446744073709551616, expected an integer of 64 bits"),
    ],
    ids=str,
)
def test_what_is_no_number(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nac.plan(mlp(6, 16, 24, 3), torch.randn(4, 6), **asked)


def test_names_of_layers_from_a_generator() -> None:
    plan = nac.plan(mlp(6, 16, 24, 3), torch.randn(4, 6), width=0.5, only=(name for name in ("2",)))
    assert plan.widths == {"2": 12}
    with pytest.raises(TypeError, match=r"only=5: expected a sequence of names"):
        nac.plan(mlp(6, 16, 24, 3), torch.randn(4, 6), width=0.5, only=5)  # type: ignore[arg-type]


def test_misuse() -> None:
    model, inputs = network("vgg16")
    with pytest.raises(ValueError, match=r"expected width=, params=, flops= or latency= .* got none of them"):
        nac.plan(model, inputs)
    with pytest.raises(ValueError, match=r"params=0.0001 cannot be met, the smallest possible is 0\.00"):
        nac.plan(model, inputs, params=0.0001, calibration="none")
    with pytest.raises(ValueError, match=r"params=1.5, expected the share to keep"):
        nac.plan(model, inputs, params=1.5)
    with pytest.raises(ValueError, match=r"flops=True, expected the share to keep"):
        nac.plan(model, inputs, flops=True)
    with pytest.raises(ValueError, match=r"limits= and multiple_of= are for budgets"):
        nac.plan(model, inputs, width=0.5, multiple_of=8)
    with pytest.raises(ValueError, match=r"multiple_of=0, expected at least 1"):
        nac.plan(model, inputs, params=0.5, multiple_of=0)
    with pytest.raises(ValueError, match=r"features.0: limits are 8 to 4 neurons, expected the fewest first"):
        nac.plan(model, inputs, params=0.5, limits={"features.0": (8, 4)})
    with pytest.raises(ValueError, match=r"features.0: limits are 4, expected a pair"):
        nac.plan(model, inputs, params=0.5, limits={"features.0": 4})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"unknown layer 'layer9'"):
        nac.plan(model, inputs, params=0.5, limits={"layer9": (1, 4)})
    with pytest.raises(ValueError, match="expected either a plan or width="):
        nac.compress(model, inputs, nac.plan(model, inputs, width=0.5), params=0.5)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.2, 3.0), min_size=3, max_size=3), st.floats(0.15, 0.8))
def test_widths_are_nearly_the_best(powers: list[float], share: float) -> None:
    model, inputs = network("split")
    graph = record(model, inputs)
    sizes = Sizes(graph.groups, {n: p.shape for n, p in model.named_parameters()}, graph.operations, graph.flops)
    groups = graph.groups
    losses = [
        {k: (group.size / k) ** power - 1 for k in range(1, group.size + 1)}
        for group, power in zip(groups, itertools.cycle(powers), strict=False)
    ]
    limits = [Limits(1, group.size) for group in groups]
    whole = float(sizes.cost(torch.tensor([g.size for g in groups], dtype=torch.float64))[0])
    target = share * whole
    found = allocate(losses, limits, sizes, (target, math.inf))
    fits = [
        widths
        for widths in itertools.product(*(range(1, group.size + 1) for group in groups))
        if float(sizes.cost(torch.tensor(widths, dtype=torch.float64))[0]) <= target
    ]

    def lost(widths: tuple[int, ...] | list[int]) -> float:
        return sum(loss[width] for loss, width in zip(losses, widths, strict=True))

    if not fits:
        assert found == [1] * len(groups)
        return
    assert tuple(found) in fits
    narrow = sum(loss[1] for loss in losses)
    assert lost(found) <= min(map(lost, fits)) + 0.15 * narrow


def test_error_curves() -> None:
    model, inputs = network("vgg16")
    graph = record(model, inputs)
    evidence = gather(model, inputs, graph.groups, [torch.randn(64, 3, 32, 32)])
    for group in graph.groups:
        curve = evidence.curve(group)
        assert set(curve) == set(widths_to_try(group.size))
        assert curve[group.size] == 0
        assert 0 < curve[1] < 1
    group = graph.groups[3]
    activity = evidence.activities[group.name]
    labels = evidence.tree(group).cut(5)
    (halves,), (outgoing,) = activity.parts(), activity.outgoing
    gain, means = outgoing @ outgoing.T, nn_means(labels, 5)
    least, summed = 0.0, 0.0
    for fit, judge in ((halves[0].double(), halves[1].double()), (halves[1].double(), halves[0].double())):

        def lost(back: torch.Tensor, judge: torch.Tensor = judge) -> float:
            left = torch.eye(group.size, dtype=torch.float64) - back @ means.T
            return float((left @ judge @ left.T * gain).sum() / (judge * gain).sum())

        least += lost(torch.linalg.lstsq(means.T @ fit @ means, means.T @ fit).solution.T) / 2  # no ridge
        summed += lost(torch.nn.functional.one_hot(labels, 5).double()) / 2
    found = error_curve(evidence.tree(group).cut, group.size, activity)[5]
    assert found <= summed + 1e-6
    assert abs(found - least) < 0.1 * abs(summed - least)


def test_an_error_is_that_of_inputs_that_were_not_fitted() -> None:
    """Half of the inputs say that the second neuron is the first, the other half that it is not."""
    alike, unlike = torch.ones(2, 2), torch.eye(2)
    weights = torch.eye(2, dtype=torch.float64)
    halves = tuple(Part(10.0, torch.zeros(2, dtype=torch.float64), covariance) for covariance in (alike, unlike))
    activity = Activity(((alike + unlike).double() / 2,), (weights,), (halves,), (True,))
    seen = Activity((alike.double(),), (weights,))
    removed = torch.tensor([0, -1])
    assert error_at(removed, 1, seen) < 1e-3
    # fitted to the first half, the removed neuron is taken for the other: twice as wrong as nothing on the second
    assert error_at(removed, 1, activity) == pytest.approx((0.5 + 0.5) / 2, abs=0.02)


def test_what_is_removed_contributes_least() -> None:
    covariance = torch.diag(torch.tensor([4.0, 1.0, 9.0, 0.0], dtype=torch.float64))
    weights = torch.tensor([[1.0], [3.0], [0.1], [50.0]], dtype=torch.float64)
    activity = Activity((covariance,), (weights,))
    assert activity.removal(2).tolist() == [0, 1, -1, -1]
    assert activity.removal(1).tolist() == [-1, 0, -1, -1]
    assert activity.removal(4).tolist() == [0, 1, 2, 3]


def test_neurons_like_one_that_stays_are_merged_with_it_in_place_of_removed() -> None:
    covariance = torch.eye(4, dtype=torch.float64)
    covariance[0, 2] = covariance[2, 0] = 0.95
    weights = torch.tensor([[2.0], [3.0], [1.0], [1.0]], dtype=torch.float64)
    assert Activity((covariance,), (weights,)).mixed(2).tolist() == [0, 1, 0, -1]


def nn_means(labels: torch.Tensor, k: int) -> torch.Tensor:
    summing = torch.nn.functional.one_hot(labels, k).double()
    return summing / summing.sum(0)


def test_inertia_is_the_share_of_variance_within_clusters() -> None:
    points = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    curve = inertia_curve(nac.ward_linkage(points))
    assert curve[2] == pytest.approx(1 / 101)
    assert curve[4] == 0
    assert set(inertia_curve(nac.ward_linkage(torch.ones(9, 3))).values()) == {0.0}


def test_inertia_of_many_points_is_that_of_their_clusters() -> None:
    points = torch.randn(40, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tree = nac.ward_linkage(points)
    centred = points - points.mean(0)
    for kept, share in inertia_curve(tree).items():
        means = nn_means(tree.cut(kept), kept)
        within = centred - (means > 0).double() @ means.T @ centred
        assert share == pytest.approx(float(within.square().sum() / centred.square().sum()), abs=2e-6)


def test_losses_go_through_what_was_measured_and_never_fall() -> None:
    curve = {1: 0.9, 2: 0.3, 4: 0.1, 8: 0.03, 9: 0.02, 16: 0.0}
    losses = _through({0.03: 0.001, 0.1: 0.02, 0.3: 0.5}, curve)
    assert (losses[8], losses[4], losses[2]) == pytest.approx((0.001, 0.02, 0.5))
    ordered = [losses[k] for k in sorted(losses)]
    assert ordered == sorted(ordered, reverse=True)
    assert losses[16] == 0
    assert _through({0.1: 0.02}, curve)[4] == pytest.approx(0.02)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_harsh_budget_on_few_inputs_loses_no_more_than_one_share_of_all_widths(seed: int) -> None:
    """Ninety-six inputs of eight dimensions are reproduced almost exactly by a hundred neurons, and tell little."""
    torch.manual_seed(seed)
    sizes = itertools.pairwise((64, 300, 300, 800, 10))
    model = nn.Sequential(*(layer for a, b in sizes for layer in (nn.Linear(a, b), nn.ReLU())))[:-1].eval()
    mixing = torch.randn(8, 64)
    inputs, fresh = torch.randn(96, 8) @ mixing, torch.randn(2000, 8) @ mixing
    options: dict[str, Any] = {"calibration": [inputs], "refine": 0}
    alike = nac.compress(model, inputs[:1], width=0.18, **options)
    chosen = nac.compress(model, inputs[:1], params=nac.cost(alike, inputs[:1]).parameters, **options)
    with torch.no_grad():
        lost = [float((small(fresh) - model(fresh)).square().mean()) for small in (chosen, alike)]
    assert lost[0] <= 1.02 * lost[1]


class Picky(nn.Module):
    """Runs at two widths only, neither of which a budget of 0.3 asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        if hidden.shape[1] not in (8, 16):
            raise RuntimeError("8 or 16, please")
        return self.last(hidden)


def test_a_network_that_runs_at_no_width_that_a_budget_needs_is_an_error_that_says_why() -> None:
    with pytest.raises(ValueError, match=r"nothing to compress: first \(16\): .*8 or 16, please"):
        nac.plan(Picky().eval(), torch.randn(2, 6), params=0.3)
