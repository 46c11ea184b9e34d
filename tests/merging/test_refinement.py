"""Refinement: the smaller network learns to answer as the original does, and nothing else changes."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nac_gpu as nac
from nac_gpu.calibration.batches import Divided
from nac_gpu.merging import refinement
from nac_gpu.merging.refinement import BATCH, Amount, augmented, rebatched
from nac_gpu.network.state import tensors


def inputs(count: int, seed: int, size: int = 20) -> Tensor:
    """Inputs that vary in few directions, as data do."""
    mixing = torch.randn(6, size, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator) @ mixing + 0.1 * torch.randn(count, size, generator=generator)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 5))


def distance(model: nn.Module, small: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((small(x) - model(x)).square().mean())


@pytest.mark.parametrize("seed", range(3))
def test_a_refined_network_is_nearer_to_the_original_on_inputs_that_it_has_not_seen(seed: int) -> None:
    model, fresh = network(seed), inputs(500, 7)
    made = [nac.compress(model, fresh[:1], width=0.3, calibration=[inputs(512, 1)], refine=n) for n in (0, 80)]
    plain, refined = (distance(model, small, fresh) for small in made)
    assert refined < 0.8 * plain
    assert [p.shape for p in made[0].parameters()] == [p.shape for p in made[1].parameters()]


def test_the_original_the_random_state_and_the_flags_are_left_alone() -> None:
    model = network().train()
    model[2].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in tensors(model).items()}
    state = torch.random.get_rng_state()
    small = nac.compress(model, inputs(1, 0), width=0.5, calibration=[inputs(128, 1)])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in tensors(model).items())
    assert all(p.grad is None for net in (model, small) for p in net.parameters())
    assert all(module.training for net in (model, small) for module in net.modules())
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    again = nac.compress(model, inputs(1, 0), width=0.5, calibration=[inputs(128, 1)])
    assert all(torch.equal(a, b) for a, b in zip(tensors(small).values(), tensors(again).values(), strict=True))


def test_only_what_merging_touched_is_trained() -> None:
    model = network()
    x = [inputs(128, 1)]
    plain, refined = (
        nac.compress(model, inputs(1, 0), width=0.5, only=["0"], calibration=x, refine=passes) for passes in (0, 80)
    )
    same = {
        name
        for (name, a), b in zip(tensors(plain).items(), tensors(refined).values(), strict=True)
        if torch.equal(a, b)
    }
    assert same == {"2.bias", "4.weight", "4.bias"}


def test_what_makes_it_worse_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), inputs(128, 1)
    plain = nac.compress(model, x[:1], width=0.5, calibration=[x], refine=0)
    for rate in (30.0, float("inf")):
        monkeypatch.setattr(refinement, "_RATE", rate)
        refined = nac.compress(model, x[:1], width=0.5, calibration=[x])
        assert all(torch.equal(a, b) for a, b in zip(tensors(plain).values(), tensors(refined).values(), strict=True))


def test_synthetic_inputs_have_a_rate_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = network(), inputs(1, 0)
    plain = nac.compress(model, x, width=0.5, refine=0)
    monkeypatch.setattr(refinement, "_RATE_CAREFUL", float("inf"))
    refined = nac.compress(model, x, width=0.5)
    assert all(torch.equal(a, b) for a, b in zip(tensors(plain).values(), tensors(refined).values(), strict=True))


class Ungraded(nn.Sequential):
    """A network that cannot be trained."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("no gradient for this")
        return super().forward(input)


def test_a_network_that_cannot_be_trained_is_left_unrefined_and_that_is_said() -> None:
    model, x = Ungraded(*network()), inputs(128, 1)
    plain = nac.compress(model, x[:1], width=0.5, calibration=[x], refine=0)
    with pytest.warns(UserWarning, match=r"not refined, because training failed \(RuntimeError: no gradient"):
        small = nac.compress(model, x[:1], width=0.5, calibration=[x])
    assert all(torch.equal(a, b) for a, b in zip(tensors(plain).values(), tensors(small).values(), strict=True))


class Adding(nn.Module):
    """Its code adds what a layer gives to a tensor of the inputs' type, and takes no other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 24), nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(x))
        return x.new_zeros(len(x), 3).index_add(0, rows, self.last(self.first(x).relu()))


def test_a_network_that_does_not_take_bfloat16_learns_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refinement, "multiplies_bfloat16", lambda _: True)
    torch.manual_seed(0)
    model, x, fresh = Adding().eval(), torch.randn(256, 12), torch.randn(256, 12)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="same scalar type"):
        model(x)
    plain, refined = (nac.compress(model, x[:1], width=0.3, calibration=[x], refine=n) for n in (0, 40))
    assert distance(model, refined, fresh) < distance(model, plain, fresh)


def test_a_network_too_large_for_the_memory_is_left_unrefined_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(refinement.os, "sysconf", lambda name: pages[name])
    with pytest.warns(UserWarning, match=r"it needs 0\.0 GB, expected at most half of the 0\.0 GB of cpu"):
        nac.compress(network(), inputs(1, 0), width=0.5, calibration=[inputs(128, 1)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_stay_what_they_are(dtype: torch.dtype) -> None:
    model, x = network().to(dtype), inputs(256, 1).to(dtype)
    plain, refined = (nac.compress(model, x[:1], width=0.3, calibration=[x], refine=n) for n in (0, 40))
    assert {p.dtype for p in refined.parameters()} == {dtype}
    fresh = inputs(300, 5).to(dtype)
    assert distance(model, refined, fresh) < distance(model, plain, fresh)


class Tokens(nn.Module):
    """Reads tokens, by keyword, and gives several things."""

    def __init__(self, layers: int = 1, dropout: float = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 24, layers, batch_first=True, dropout=dropout)
        self.hidden = nn.Linear(24, 64)
        self.out = nn.Linear(64, 3)

    def forward(self, *, tokens: Tensor) -> dict[str, Tensor]:
        read, _ = self.lstm(self.embedding(tokens))
        return {"tokens": tokens, "scores": self.out(self.hidden(read).relu())}


def test_batches_of_tokens_are_not_augmented_and_recurrent_layers_learn_too() -> None:
    torch.manual_seed(0)
    model = Tokens().eval()
    batches = [{"tokens": torch.randint(50, (8, 12))} for _ in range(6)]
    plain, refined = (nac.compress(model, batches[0], width=0.4, calibration=batches, refine=n) for n in (0, 40))
    fresh = torch.randint(50, (100, 12))
    with torch.no_grad():
        wanted, a, b = (net(tokens=fresh)["scores"] for net in (model, plain, refined))
    assert float((b - wanted).square().mean()) < 0.9 * float((a - wanted).square().mean())
    looked = islice(augmented(batches, torch.Generator()), 12)
    assert sorted(map(id, looked)) == sorted(2 * [id(batch) for batch in batches])


def test_a_recurrent_layer_is_one_operation_and_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA it has gradients in training mode only; step by step, bfloat16 is very slow on a CPU."""
    torch.manual_seed(0)
    model, descend = Tokens(2, dropout=0.9).eval(), refinement._Learning._descend
    seen: list[tuple[bool, float]] = []

    def watched(self: refinement._Learning, *given: Any) -> None:
        layers = [module for network in (self._small, self._model) for module in network.modules()]
        seen.extend((m.training, m.dropout) for m in layers if isinstance(m, nn.LSTM))
        assert torch._C._get_mkldnn_enabled()
        assert not any(m.training for m in layers if not isinstance(m, nn.LSTM))
        descend(self, *given)

    monkeypatch.setattr(refinement._Learning, "_descend", watched)
    batches = [{"tokens": torch.randint(50, (8, 12))} for _ in range(6)]
    refined: Any = nac.compress(model, batches[0], width=0.4, calibration=batches)
    assert seen == [(True, 0.0)] * 2
    assert (refined.lstm.training, refined.lstm.dropout) == (False, 0.9)


def test_a_negative_number_of_passes_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"refine=-1, expected a number of passes"):
        nac.compress(network(), inputs(1, 0), width=0.5, refine=-1)


def test_batches_are_joined_and_divided_anew_where_they_are_alike() -> None:
    x = torch.randn(150, 4)
    parts = rebatched(list(x.split(7)))
    assert [len(part) for part in parts] == [BATCH, BATCH, 150 - 2 * BATCH]
    assert torch.equal(torch.cat([part for part in parts if isinstance(part, Tensor)]), x)
    pairs = rebatched([{"a": x[:70], "b": x[:70, :2]}, {"a": x[70:], "b": x[70:, :2]}])
    assert isinstance(pairs[0], dict)
    assert len(pairs) == 3
    assert torch.equal(pairs[1]["b"], x[64:128, :2])
    for other in ([x, x[:, :2]], [x, {"a": x}], [x.long()], [(x, x[:3])]):
        assert rebatched(other) == other


def test_batches_of_tokens_are_divided_and_tokens_can_be_limited() -> None:
    tokens = torch.arange(8 * 400).view(8, 400)
    parts = rebatched([{"input_ids": tokens, "use_cache": False}])
    assert [part["input_ids"].shape for part in parts if isinstance(part, dict)] == [(2, 400)] * 4
    assert torch.equal(torch.cat([part["input_ids"] for part in parts if isinstance(part, dict)]), tokens)
    flat = nn.Linear(400, 3)
    learning = refinement._Learning(flat, flat, dict(flat.named_parameters()), Divided([{"input_ids": tokens}]))
    assert [learning._steps(Amount(9, most)) for most in (None, 1600, 1, 10**9)] == [36, 2, 1, 36]


def test_images_are_shifted_mirrored_and_mixed() -> None:
    images = torch.rand(40, 3, 16, 16)
    images[:, 1] = images[:, 0]  # channels move together
    found = next(augmented([images], torch.Generator().manual_seed(0)))
    assert isinstance(found, Tensor)
    assert found.shape == images.shape
    assert torch.equal(found[:, 1], found[:, 0])
    padded = nn.functional.pad(images, (2, 2, 2, 2), mode="reflect")
    windows = padded.unfold(2, 16, 1).unfold(3, 16, 1)  # [n, c, 5, 5, 16, 16]
    windows = torch.cat([windows, windows.flip(5)], dim=2).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)

    def alone(at: int) -> bool:
        return any(torch.equal(found[at], window) for window in windows[at])

    unmixed = sum(alone(at) for at in range(40))
    assert 10 <= unmixed <= 30
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


@pytest.mark.parametrize(
    ("build", "expected"), [(lambda: torch.zeros(640, 20), 30), (lambda: torch.zeros(64, 3, 512, 512), 3)]
)
def test_inputs_that_are_few_or_large_are_seen_less_often(
    build: Callable[[], Tensor], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refinement, "STEPS", 12 if build().ndim > 2 else 1280)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(build()[0].numel(), 3))
    learning = refinement._Learning(flat, flat, dict(flat.named_parameters()), Divided([build()]))
    assert learning._steps(Amount(3)) == expected
