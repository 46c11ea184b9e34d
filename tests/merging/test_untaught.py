"""Without inputs, models that read tokens are made smaller in the way that changes answers to random ones least."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nac_gpu as nac
from nac_gpu.files.origin import origin_of

TOKENS = torch.arange(12).reshape(2, 6)


class Gated(nn.Module):
    """Gated neurons of which an eighth do nearly all; their weights are smaller than those of the others."""

    def __init__(self, image: bool = False, picky: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image, self.picky = image, picky
        self.table = nn.Embedding(64, 16)
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 8)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
            self.gate.bias -= 12
            self.gate.bias[::8] += 15
            for layer in (self.gate, self.up):
                layer.weight *= 2
                layer.weight[::8] /= 4

    def forward(self, tokens: Tensor) -> Tensor:
        if self.picky and not torch.equal(tokens.cpu(), TOKENS):
            raise ValueError("only these tokens")
        x = tokens if self.image else self.table(tokens)
        return self.head(x + self.down(nn.functional.silu(self.gate(x)) * self.up(x)))


def lines(model: nn.Module) -> tuple[str, ...]:
    origin = origin_of(model)
    assert origin is not None
    return tuple(origin.plan.changes)


def apart(model: nn.Module, small: nn.Module) -> float:
    tokens = torch.randint(64, (64, 6), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return float((model(tokens) - small(tokens)).square().mean() / model(tokens).var())


def test_neurons_are_removed_where_averages_are_wrong() -> None:
    """The idle ones have the larger weights: removing the smallest is as wrong as averaging."""
    model = Gated().eval()
    options: dict[str, Any] = {"width": 0.75, "calibration": "none", "only": ["gate"]}
    small = nac.compress(model, TOKENS, **options)
    assert any("tried on random tokens: 1 groups by removal at random" in line for line in lines(small))
    others = {method: apart(model, nac.compress(model, TOKENS, method=method, **options)) for method in ("ward", "l1")}
    assert apart(model, small) < 0.8 * min(others.values())
    again = nac.compress(model, TOKENS, **options)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))


def test_copies_are_merged_exactly() -> None:
    model = Gated().eval()
    with torch.no_grad():
        for tensor in (model.gate.weight, model.gate.bias, model.up.weight, model.up.bias):
            tensor[16:] = tensor[:16]
    small = nac.compress(model, TOKENS, width=0.5, calibration="none", only=["gate"])
    assert any("1 groups by ward" in line for line in lines(small))
    assert apart(model, small) < 1e-10


def test_a_model_that_takes_no_other_tokens_is_merged_and_says_why() -> None:
    model = Gated(picky=True).eval()
    with pytest.warns(UserWarning, match="other ways could not be tried"):
        small = nac.compress(model, TOKENS, width=0.75, calibration="none")
    assert small.down.in_features == 24
    assert any("merged by their weights, because other ways could not be tried" in line for line in lines(small))


@pytest.mark.parametrize("method", ["auto", "ward", "random"])
def test_what_reads_numbers_and_what_a_user_names_is_not_tried(method: Any) -> None:
    model, inputs = Gated(image=method == "auto").eval(), TOKENS
    if method == "auto":
        inputs = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    small = nac.compress(model, inputs, width=0.75, calibration="none", method=method)
    assert not any("tried" in line for line in lines(small))
