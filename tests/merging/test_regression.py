"""The regression of a consumer: never worse than none where it was not fitted, and the same in both of its forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nac_gpu as nac
from nac_gpu.calibration.moments import FOLDS, Moments, folds_of
from nac_gpu.calibration.readings import row_weights
from nac_gpu.merging import regression
from nac_gpu.merging.regression import Terms, empty_folds, fitted


def folds(values: Tensor, whole: Tensor, made: Tensor) -> list[Terms]:
    found = empty_folds()
    for fold, rows in folds_of(0, 1, len(values)):
        found[fold].add(values[rows], whole[rows], made[rows], torch.ones(len(values[rows]), dtype=values.dtype))
    return found


def problem(rows: int, p: int, out: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    values = drawn(rows, p) + 1
    whole = values @ drawn(p, out) / p**0.5 + noise * drawn(rows, out) + 3
    return values, whole, torch.zeros_like(whole)


def test_what_can_be_explained_is() -> None:
    values, whole, made = problem(400, 10, 3, 0.0)
    fit = fitted(folds(values, whole, made), None, intercept=True)
    assert fit is not None
    assert fit.lost < 1e-3
    assert torch.allclose(values @ fit.weight + fit.constant, whole, atol=0.1)


def test_noise_is_left_alone() -> None:
    """Nothing is to be learnt, and there are as many samples as values."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, 40, generator=generator, dtype=torch.float64)
    whole = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    fit = fitted(folds(values, whole, torch.zeros_like(whole)), None, intercept=False)
    assert fit is not None
    assert fit.after <= fit.before
    assert float(fit.weight.abs().max()) < 0.2


def test_one_sample_changes_nothing() -> None:
    fit = fitted(folds(*problem(1, 4, 2, 0.0)), None, intercept=True)
    assert fit is not None
    assert not fit.weight.any()
    assert not fit.constant.any()
    assert fitted(empty_folds(), None, intercept=True) is None


def test_samples_and_moments_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values, whole, made = problem(30, 60, 3, 0.1)
    by_moments = fitted(folds(values, whole, made), None, intercept=True)
    monkeypatch.setattr(regression, "MOST_VALUES", 50)
    by_samples = fitted(folds(values, whole, made), None, intercept=True)
    assert by_moments is not None
    assert by_samples is not None
    assert by_moments.chosen == by_samples.chosen
    assert torch.allclose(by_moments.weight, by_samples.weight, atol=1e-6)
    assert torch.allclose(by_moments.constant, by_samples.constant, atol=1e-6)
    assert by_moments.after == pytest.approx(by_samples.after)


def test_random_combinations_of_outputs_choose_as_all_of_them_do(monkeypatch: pytest.MonkeyPatch) -> None:
    values, whole, made = problem(300, 60, 400, 0.5)
    some = fitted(folds(values, whole, made), None, intercept=True)
    monkeypatch.setattr(regression, "_MOST_OUTPUTS", 400)
    every = fitted(folds(values, whole, made), None, intercept=True)
    assert some is not None
    assert every is not None
    assert some.chosen == every.chosen
    assert torch.equal(some.weight, every.weight)
    assert some.after == pytest.approx(every.after)


def test_a_token_of_huge_norm_counts_as_one_of_a_large_one() -> None:
    rows = torch.ones(100, 4)
    rows[7] *= 1000
    weights = row_weights(rows)
    assert weights[0] == 1
    assert float(weights[7].sqrt() * 1000) < 2 * 11 * 2
    assert float(row_weights(torch.zeros(3, 2)).max()) == 1


def test_moments_of_weighted_samples() -> None:
    a, b = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    counts = torch.tensor([1, 2, 0, 3, 1, 1, 2, 1, 1])
    weighted, repeated = Moments(), Moments()
    weighted.add(a, b, counts.double())
    repeated.add(a.repeat_interleave(counts, 0), b.repeat_interleave(counts, 0))
    assert torch.allclose(weighted.covariance, repeated.covariance)
    assert torch.allclose(weighted.second, repeated.second)
    total = Moments.total([weighted, repeated])
    assert total.count == 24
    assert torch.allclose(total.covariance, repeated.covariance)
    assert weighted.count == 12


def test_folds_have_all_samples_once() -> None:
    assert folds_of(6, 8, 5) == [(6 % FOLDS, slice(0, 5))]
    parts = folds_of(0, 1, 10)
    assert [fold for fold, _ in parts] == list(range(FOLDS))
    assert [row for _, rows in parts for row in range(10)[rows]] == list(range(10))
    assert sum(len(range(2)[rows]) for _, rows in folds_of(0, 1, 2)) == 2


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    width=st.sampled_from([24, 48, 96]),
    inputs=st.sampled_from([32, 48, 64, 96, 256]),
    seed=st.integers(0, 1000),
    noise=st.sampled_from([0.0, 1.0]),
)
def test_compensation_is_never_worse_than_none_on_new_inputs(width: int, inputs: int, seed: int, noise: float) -> None:
    """Samples fewer than, as many as and more than the neurons that are kept; inputs with and without structure."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(48, 2 * width), nn.ReLU(), nn.Linear(2 * width, 24, bias=False)).eval()
    scale = torch.linspace(0, 2, 48).exp() * (1 - noise) + noise

    def drawn(count: int) -> Tensor:
        return torch.randn(count, 48) * scale

    new, seen = drawn(2048), list(drawn(inputs).split(16))
    errors = []
    with torch.no_grad():
        expected = model(new)
        for rule in ("restored", "compensated"):
            small = nac.compress(
                model, new[:1], width=0.5, calibration=seen, refine=0, rule=rule, neurons="activations", method="ward"
            )
            errors.append(float((small(new) - expected).square().mean()))
    assert errors[1] <= 1.02 * errors[0]
