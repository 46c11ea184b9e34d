"""Mixtures of experts are found by their form; what only looks like one, or is not reached, stays."""

import pytest
import torch
from tinymixtures import CLASSES, WIDTH, Listed, X, made
from torch import Tensor, nn

import nac_gpu as nac
from nac_gpu.experts.mixtures import find_mixtures
from nac_gpu.files.origin import origin_of


@pytest.mark.parametrize("kind", CLASSES)
def test_mixtures_are_found_by_their_form(kind: str) -> None:
    (mixture,), others = find_mixtures(made(kind), X)
    assert (mixture.count, bool(mixture.keys), others) == (6, kind == "listed", [])
    assert dict(mixture.router) == {"router.weight": 0, "router.bias": 0}
    assert mixture.name == ("experts" if kind == "listed" else "")


class Pair(nn.Module):
    """Two mixtures; the second is for other inputs than the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Listed(), Listed()
        self.num_experts = 6

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return self.b(x)
        return self.a(x * mask)


def test_what_the_inputs_do_not_reach_stays_and_that_is_said() -> None:
    """And several floating inputs are no inputs to dream up: that the outputs get no nearer is said, too."""
    torch.manual_seed(0)
    model = Pair().eval()
    small = nac.merge_experts(model, (X, torch.ones(6)), 3)
    assert (small.a.num_experts, small.b.num_experts, small.num_experts) == (3, 6, 6)
    with torch.no_grad():
        assert torch.equal(small(X), model(X))
    origin = origin_of(small)
    assert origin is not None
    assert "a.experts: 6 experts became 3" in origin.plan.changes
    (alone,) = (said for said in origin.plan.changes if "b.experts" in said)
    assert alone.startswith("b.experts is left alone: its parts change nothing")
    assert any("without compensation" in said for said in origin.plan.changes)


class Together(nn.Module):
    """The routers are beside, not inside, what holds the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)
        self.a, self.b = nn.Module(), nn.Module()
        for part in (self.a, self.b):
            part.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)) for _ in range(4))
            part.num_experts = 4

    def forward(self, x: Tensor) -> Tensor:
        for router, part in ((self.first, self.a), (self.second, self.b)):
            scores = router(x).softmax(-1)
            x = x + sum(part.experts[i](x) * scores[..., i, None] for i in range(part.num_experts))
        return x


def test_one_mixture_of_several_with_routers_in_one_place() -> None:
    torch.manual_seed(0)
    model = Together().eval()
    (first, second), others = find_mixtures(model, X)
    assert [name for name, _ in first.router + second.router] == [
        *("first.weight", "first.bias"),
        *("second.weight", "second.bias"),
    ]
    assert others == []
    small = nac.merge_experts(model, X, {"a.experts": 3}, refine=0)
    assert (small.a.num_experts, small.b.num_experts) == (3, 4)
    assert (small.first.out_features, small.second.out_features) == (3, 4)
    assert torch.equal(small.b.experts[3][0].weight, model.b.experts[3][0].weight)


class Chosen(Listed):
    """Its choice has a bias, zero so far, that is not where the router is."""

    def __init__(self) -> None:
        super().__init__(bias=False)
        self.register_buffer("bias_of_choice", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).tanh().flatten(0, 1)
        scores = self.router(x)
        chosen = (scores + self.bias_of_choice).argmax(-1)
        y = torch.stack([self.answer(x, i) for i in range(self.num_experts)])
        return self.head(y[chosen, torch.arange(len(x))])


def test_a_bias_of_the_choice_belongs_to_the_router_wherever_it_is() -> None:
    torch.manual_seed(0)
    model = Chosen().eval()
    (mixture,), _ = find_mixtures(model, X)
    assert [name for name, _ in mixture.router] == ["router.weight", "bias_of_choice"]
    small = nac.merge_experts(model, X, 3, refine=0)
    assert small.bias_of_choice.shape == (3,)
    assert torch.equal(model.bias_of_choice, torch.zeros(6))


def test_experts_that_differ_in_form_are_said_to() -> None:
    model = made("listed")
    model.experts[2] = nn.Sequential(nn.Linear(WIDTH, 3), nn.ReLU(), nn.Linear(3, 8))
    with pytest.raises(ValueError, match=r"experts: its parts differ: 0\.0\.weight \(14, 10\), 2\.0\.weight \(3, 10\)"):
        nac.merge_experts(model, X, 3)


class Layers(nn.Module):
    """As many equal layers as the head has outputs: it looks like a mixture, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).relu() + x
        return self.head(x)


def test_what_only_looks_like_a_mixture_is_told_from_one() -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"blocks: in another order its 3 parts and head\.weight"):
        nac.merge_experts(Layers(), X, 2)
    with pytest.raises(ValueError, match="no mixture of experts was found, expected modules of equal shapes"):
        nac.merge_experts(nn.Linear(6, 2), X, 2)


class Idle(Listed):
    """Its experts answer, and nothing comes of it."""

    def answer(self, x: Tensor, number: int) -> Tensor:
        return 0 * super().answer(x, number)


def test_experts_that_change_nothing_are_not_merged() -> None:
    torch.manual_seed(0)
    model = Idle().eval()
    with pytest.raises(ValueError, match="experts: its parts change nothing in the outputs of these example inputs"):
        nac.merge_experts(model, X, 2)


class Shared(Listed):
    """Beside a router, other tensors with as many entries as there are experts."""

    def __init__(self) -> None:
        super().__init__(count=WIDTH)
        self.beside = nn.Linear(WIDTH, WIDTH)

    def answer(self, x: Tensor, number: int) -> Tensor:
        return super().answer(self.beside(x).tanh(), number)


def test_the_router_is_found_among_tensors_of_the_same_size() -> None:
    torch.manual_seed(0)
    (mixture,), _ = find_mixtures(Shared().eval(), torch.zeros_like(X))
    assert dict(mixture.router) == {"router.weight": 0, "router.bias": 0}
