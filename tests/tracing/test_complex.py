"""Complex parameters are left alone, with what meets them; all else merges."""

from pathlib import Path

import pytest
import torch
from plans import prepared
from torch import Tensor, nn
from torch.nn import functional as F

import nac_gpu as nac
from nac_gpu.network.comparing import change, relative_error
from nac_gpu.network.copying import converted
from nac_gpu.network.probes import lively
from nac_gpu.testing import check_copies, merge_copies


class Spectral(nn.Module):
    """A layer of a Fourier neural operator between others; the spectrum may be returned, too."""

    def __init__(self, *, told: bool = False) -> None:
        super().__init__()
        self.told = told
        self.lift = nn.Sequential(nn.Conv1d(2, 12, 1), nn.GELU(), nn.Conv1d(12, 6, 1))
        self.weight = nn.Parameter(torch.randn(6, 6, 4, dtype=torch.cfloat))
        self.skip = nn.Conv1d(6, 6, 1)
        self.head = nn.Sequential(nn.Conv1d(6, 16, 1), nn.GELU(), nn.Conv1d(16, 1, 1))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.lift(x)
        spectrum = torch.fft.rfft(x)
        made = torch.einsum("bix,iox->box", spectrum[..., :4], self.weight)
        x = torch.fft.irfft(F.pad(made, (0, spectrum.shape[-1] - 4)), n=x.shape[-1])
        out = self.head(F.gelu(x + self.skip(x)))
        return (out, made.conj()) if self.told else out


class Modulated(nn.Module):
    """Channels multiplied by complex numbers, without a transform, and a complex linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.other, self.head = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.turn = nn.Parameter(torch.randn(8, dtype=torch.cfloat))
        self.mix = nn.Linear(8, 8, dtype=torch.cfloat)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other(self.mix(self.make(x) * self.turn).abs()).relu())


@pytest.mark.parametrize("told", [False, True])
def test_a_spectral_layer_leaves_the_rest_of_the_model(told: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Spectral(told=told).eval(), torch.randn(2, 2, 16)
    plan = prepared(model, inputs)
    assert {group.name for group in plan.groups} == {"lift.0", "head.0"}
    assert {alone.layer: alone.reason for alone in plan.plan.left_alone}["weight"] == "weight is complex"
    assert merge_copies(plan.model, inputs, plan.choices).error < 1e-8
    small = nac.compress(model, inputs, width=0.5, calibration=[inputs], refine=2)
    assert torch.equal(small.weight, model.weight)
    nac.save(small, tmp_path / "small.safetensors")
    loaded = nac.load(tmp_path / "small.safetensors", lambda: Spectral(told=told))
    assert torch.equal(loaded.weight, model.weight)
    assert loaded.lift[0].out_channels == 6


def test_channels_that_meet_complex_numbers_are_left_alone() -> None:
    torch.manual_seed(0)
    model, inputs = Modulated().eval(), torch.randn(3, 4)
    plan = prepared(model, inputs)
    assert [group.name for group in plan.groups] == ["other"]
    reasons = {alone.layer: alone.reason for alone in plan.plan.left_alone}
    assert reasons["make"] == "turn is complex"
    assert reasons["mix"] == "mix.weight is complex"
    assert check_copies(model, inputs).error < 1e-8


def test_complex_weights_must_be_finite_and_integers_are_refused() -> None:
    model = Modulated()
    with torch.no_grad():
        model.turn[2] = complex(0, float("nan"))
    with pytest.raises(ValueError, match="turn has 1 values that are NaN or infinite"):
        nac.plan(model, torch.randn(3, 4), width=0.5)
    model.turn = nn.Parameter(torch.zeros(8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="turn is int8, expected a floating type"):
        nac.plan(model, torch.randn(3, 4), width=0.5)


def test_complex_tensors_are_converted_drawn_and_compared() -> None:
    model, _ = converted(Modulated(), torch.zeros(3, 4), torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64, torch.complex128}
    drawn = lively(torch.zeros(4, dtype=torch.cfloat), torch.Generator().manual_seed(0))
    assert bool((drawn.imag != 0).all())
    one = torch.tensor([1 + 1j, 2 - 4j])
    assert relative_error([one], [one]) == 0
    assert relative_error([one.conj()], [one]) == pytest.approx(2)
    share = change([one.conj()], [one])
    assert share is not None
    assert float(share) > 0
