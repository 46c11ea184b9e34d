"""compress: the original stays, the result is a normal module."""

import copy
import pickle
import shutil
from functools import partial

import pytest
import torch
from networks import NETWORKS, network
from torch import Tensor, nn

import nac_gpu as nac

pytestmark = pytest.mark.usefixtures("short_dreams")

BASELINES = ("ward", "kmeans", "random")


def snapshot(model: nn.Module) -> dict[str, object]:
    return {
        "state": {k: v.clone() for k, v in model.state_dict(keep_vars=False).items()},
        "grad": {k: p.requires_grad for k, p in model.named_parameters()},
        "ids": [id(p) for p in [*model.parameters(), *model.buffers()]],
        "modes": [m.training for m in model.modules()],
        "hooks": [list(m._forward_hooks) for m in model.modules()],
        "repr": repr(model),
    }


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    states = (a.pop("state"), b.pop("state"))
    assert isinstance(states[0], dict)
    assert isinstance(states[1], dict)
    return a == b and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_original_is_bitwise_unchanged(name: str) -> None:
    model, inputs = network(name)
    model.train()
    next(model.parameters()).requires_grad_(False)
    next(iter(model.children())).register_forward_hook(lambda *_: None)
    before = snapshot(model)
    random_state = torch.get_rng_state()
    plan = nac.plan(model, inputs, width=0.5)
    nac.compress(model, inputs, plan, method="random")
    assert same(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_the_result_keeps_type_mode_and_gradient_flags(
    dtype: torch.dtype, training: bool, device: torch.device
) -> None:
    model, inputs = network("residual")
    model = model.to(device, dtype).train(training)
    model.stem.weight.requires_grad_(False)
    small = nac.compress(model, inputs.to(device, dtype), width=0.5)
    assert type(small) is type(model)
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    for (name, old), (other, new) in zip(model.named_parameters(), small.named_parameters(), strict=True):
        assert name == other
        assert (new.dtype, new.device, new.requires_grad) == (old.dtype, old.device, old.requires_grad)
        assert isinstance(new, nn.Parameter)
        assert new.is_leaf


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", ["ward", "kmeans", "random"])
def test_the_result_is_a_normal_module(name: str, method: str) -> None:
    model, inputs = network(name)
    small = nac.compress(model, inputs, width=0.5, method=method)
    small.train()
    loss = small(inputs.repeat(2, *[1] * (inputs.ndim - 1))).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in small.parameters())
    assert nac.cost(small, inputs).parameters < nac.cost(model, inputs).parameters
    twin = copy.deepcopy(small)
    twin.load_state_dict(small.state_dict())


def test_attributes_agree_with_the_tensors() -> None:
    model, inputs = network("residual")
    small = nac.compress(model, inputs, width={"stem": 4})
    assert (small.stem.in_channels, small.stem.out_channels) == (3, 4)
    assert (small.depthwise.groups, small.depthwise.in_channels, small.depthwise.out_channels) == (4, 4, 4)
    assert small.stem_norm.num_features == 4
    assert small.act.num_parameters == 4
    assert (small.head.in_features, small.head.out_features) == (8, 4)
    assert "Linear(in_features=8, out_features=4" in repr(small)
    again = pickle.loads(pickle.dumps(small))
    assert torch.equal(again.eval()(inputs), small.eval()(inputs))


def test_memory_format_is_kept() -> None:
    model, inputs = network("vgg16")
    model = model.to(memory_format=torch.channels_last)
    small = nac.compress(model, inputs, width=0.5)
    assert small.features[3].weight.is_contiguous(memory_format=torch.channels_last)


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x).relu() + self.b(2 * x).relu())

    small = nac.compress(Tied(), torch.randn(3, 4), width=0.5)
    assert small.b.weight is small.a.weight
    assert small.a.weight.shape == (4, 4)
    assert (small.b.out_features, small.c.in_features) == (4, 4)


def test_an_unknown_operation_leaves_its_neighbours_alone_and_the_rest_is_compressed() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(torch.cdist(self.a(x), torch.eye(8))).relu())

    model, inputs = Odd(), torch.randn(3, 4)
    plan = nac.plan(model, inputs, width=0.5)
    assert plan.widths == {"b": 4}
    assert next((a.layer, "operation _cdist_forward is not known" in a.reason) for a in plan.left_alone) == ("a", True)
    assert nac.compress(model, inputs, plan)(inputs).shape == (3, 2)


def test_a_better_clustering_gives_a_closer_network() -> None:
    """Noisy copies: Ward and k-means find them, random merging does not, and nothing makes up for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(layer.weight[:16].repeat(4, 1) + 0.01 * torch.randn_like(layer.weight))
            layer.bias.copy_(layer.bias[:16].repeat(4))
    inputs = torch.randn(100, 20)
    with torch.no_grad():
        compress = partial(nac.compress, model, inputs, width=16 / 64, rule="restored")
        errors = {
            method: (compress(method=method)(inputs) - model(inputs)).square().mean()
            for method in ("ward", "kmeans", "random")
        }
    assert errors["ward"] < 0.05 * errors["random"]
    assert errors["kmeans"] < 0.05 * errors["random"]


def test_a_method_can_be_a_function() -> None:
    model, inputs = network("cnn")
    seen: list[tuple[int, int]] = []

    def halves(points: Tensor, k: int, *, weights: Tensor | None = None, seed: int = 0) -> Tensor:
        seen.append((len(points), k))
        return torch.arange(len(points)) % k

    small = nac.compress(model, inputs, width={"5": 8, "10": 30}, method=halves)
    assert seen == [(16, 8), (120, 30)]
    assert small[10].out_channels == 30


def test_seeds_change_random_merging_only_as_asked() -> None:
    model, inputs = network("cnn")
    a, b, c = (nac.compress(model, inputs, width=0.5, method="random", seed=s) for s in (1, 1, 2))
    assert torch.equal(a[5].weight, b[5].weight)
    assert not torch.equal(a[5].weight, c[5].weight)


def test_misuse() -> None:
    model, inputs = network("cnn")
    plan = nac.plan(model, inputs, width=0.5)
    with pytest.raises(
        ValueError, match=r"expected width=, params=, flops= or latency= \(or a plan, to compress\), got none of them"
    ):
        nac.compress(model, inputs)
    with pytest.raises(ValueError, match="expected either a plan or width=, params=, flops= or latency=, got both"):
        nac.compress(model, inputs, plan, width=0.5)
    methods = "auto, ward, removal, mixed, kmeans, random, l1, or a function"
    with pytest.raises(ValueError, match=f"unknown method 'kmean', expected one of {methods}"):
        nac.compress(model, inputs, width=0.5, method="kmean")
    with pytest.raises(ValueError, match="unknown rule 'mean', expected one of compensated, restored, centroid"):
        nac.compress(model, inputs, width=0.5, rule="mean")  # type: ignore[arg-type]
    other, other_inputs = network("vgg16")
    with pytest.raises(ValueError, match=r"unknown layer|another model"):
        nac.compress(other, other_inputs, plan)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_inductor_makes_the_same_of_a_compressed_model() -> None:
    model, inputs = network("normed_mlp")
    small = nac.compress(model, inputs, width=0.5, calibration="none")
    with torch.no_grad():
        assert torch.allclose(torch.compile(small)(inputs), small(inputs), atol=1e-5)
