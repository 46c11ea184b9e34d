"""Points and masses: any magnitude and dtype, and errors that say what to do."""

import math

import numpy as np
import pytest
import torch
from scipy.cluster import hierarchy

from nac_gpu import ward_linkage
from nac_gpu.clustering.points import standardise


def normal(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


@pytest.mark.parametrize("power", [-1000, -664, -500, 500, 664, 1000])
def test_any_magnitude(power, device):
    """Powers of two round nothing, so not a bit may change; 2^664 is about 1e200."""
    points = torch.tensor(normal(200, 30), device=device)
    plain, scaled = ward_linkage(points), ward_linkage(points * 2.0**power)
    assert torch.equal(scaled.merges, plain.merges)
    assert torch.equal(scaled.heights, plain.heights * 2.0**power)


def test_standardise_rounds_nothing_but_the_centre(device):
    points = torch.tensor(normal(60, 4).round(3) + 1e6, device=device)
    weights = torch.linspace(3, 40, 60, dtype=torch.float64, device=device)
    found, masses, unit = standardise(points, weights)
    assert torch.equal(masses * 32, weights)
    assert unit.item() == pytest.approx(2.0**19 * math.sqrt(32), rel=1e-15)
    assert (masses @ found).abs().max() < 1e-12
    torch.testing.assert_close((found - found[0]) * 2.0**19, points - points[0], rtol=0, atol=1e-15)
    assert torch.equal(standardise(points * 2.0**-300, None)[0], standardise(points, None)[0])


@pytest.mark.parametrize("magnitude", [1e-200, 1e200])
def test_extreme_points_equal_scipy_on_plain_ones(magnitude, device):
    points = normal(100, 20)
    heights = ward_linkage(torch.tensor(points * magnitude, device=device)).heights.cpu().numpy()
    np.testing.assert_allclose(heights, hierarchy.linkage(points, "ward")[:, 2] * magnitude, rtol=1e-10)


@pytest.mark.parametrize("factor", [2.0**-900, 2.0**900])
def test_any_magnitude_of_masses(factor, device):
    points = torch.tensor(normal(80, 30), device=device)
    weights = torch.tensor(np.random.default_rng(0).uniform(1, 5, 80), device=device)
    plain, scaled = ward_linkage(points, weights), ward_linkage(points, weights * factor)
    assert torch.equal(scaled.merges, plain.merges)
    assert torch.equal(scaled.heights, plain.heights * factor**0.5)


def test_masses_so_small_that_they_vanish_still_merge(device):
    weights = torch.tensor([1e300, 1e-300, 1e300, 1e-300], dtype=torch.float64, device=device)
    points = torch.tensor([[0.0], [1.0], [10.0], [9.5]], dtype=torch.float64, device=device)
    dendrogram = ward_linkage(points, weights)
    assert dendrogram.cut(2).tolist() == [0, 0, 1, 1]
    assert dendrogram.heights[-1].item() == pytest.approx(1e151, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_points_are_computed_in_float64(dtype, device):
    points = torch.tensor(normal(300, 70), device=device).to(dtype)
    low, high = ward_linkage(points), ward_linkage(points.double())
    assert low.heights.dtype == torch.float32
    assert high.heights.dtype == torch.float64
    assert torch.equal(low.merges, high.merges)
    assert torch.equal(low.heights, high.heights.float())


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.float16])
def test_weights_of_any_real_dtype(dtype, device):
    points = torch.tensor(normal(50, 5), device=device)
    weights = torch.arange(1, 51, device=device)
    expected = ward_linkage(points, weights.double())
    assert torch.equal(ward_linkage(points, weights.to(dtype)).heights, expected.heights)


def ones(*shape, **options):
    return torch.ones(*shape, **options)


BAD_POINTS = {
    "list": ([[1.0]], TypeError, r"points is a list, expected a torch.Tensor; use torch.as_tensor\(points\)"),
    "integers": (ones(2, 2, dtype=torch.int64), TypeError, "dtype torch.int64, expected a floating dtype; use"),
    "complex": (ones(2, 2, dtype=torch.complex64), TypeError, "dtype torch.complex64, expected a floating dtype"),
    "bool": (ones(2, 2, dtype=torch.bool), TypeError, "dtype torch.bool, expected a floating dtype"),
    "vector": (ones(3), ValueError, r"shape \(3,\), expected \(n, d\); use points.reshape\(n, -1\)"),
    "kernel": (ones(3, 2, 3, 3), ValueError, r"shape \(3, 2, 3, 3\), expected \(n, d\)"),
    "no points": (ones(0, 3), ValueError, r"shape \(0, 3\), expected at least one point and one dimension"),
    "no dimensions": (ones(3, 0), ValueError, r"shape \(3, 0\), expected at least one point and one dimension"),
    "nan": (torch.tensor([[0.0, 1], [2, float("nan")]]), ValueError, "NaN or infinity, first in row 1; remove"),
    "infinity": (torch.tensor([[0.0], [1], [-float("inf")], [float("nan")]]), ValueError, "first in row 2"),
}


@pytest.mark.parametrize("name", BAD_POINTS)
def test_bad_points(name, device):
    points, error, message = BAD_POINTS[name]
    with pytest.raises(error, match=message):
        ward_linkage(points.to(device) if isinstance(points, torch.Tensor) else points)


BAD_WEIGHTS = {
    "list": ([1.0, 1.0, 1.0], TypeError, r"weights is a list, expected a torch.Tensor; use torch.as_tensor"),
    "complex": (ones(3, dtype=torch.complex64), TypeError, "dtype torch.complex64, expected real numbers; use"),
    "bool": (ones(3, dtype=torch.bool), TypeError, "dtype torch.bool, expected real numbers"),
    "short": (ones(2), ValueError, r"shape \(2,\), expected \(3,\), one mass per point"),
    "column": (ones(3, 1), ValueError, r"shape \(3, 1\), expected \(3,\)"),
    "zero": (torch.tensor([1.0, 0.0, 1.0]), ValueError, r"weights\[1\] is 0.0, expected a positive finite mass; drop"),
    "negative": (torch.tensor([1, 1, -2]), ValueError, r"weights\[2\] is -2, expected a positive finite mass"),
    "nan": (torch.tensor([float("nan"), 1, 0]), ValueError, r"weights\[0\] is nan, expected a positive finite mass"),
    "infinity": (torch.tensor([1, float("inf"), 1]), ValueError, r"weights\[1\] is inf, expected a positive finite"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights(name, device):
    weights, error, message = BAD_WEIGHTS[name]
    with pytest.raises(error, match=message):
        ward_linkage(
            torch.tensor(normal(3, 2), device=device),
            weights.to(device) if isinstance(weights, torch.Tensor) else weights,
        )


def test_weights_on_another_device(device):
    weights = torch.ones(3, device="meta")
    with pytest.raises(ValueError, match=rf"weights is on meta, points on {device}.*; use weights.to\(points.device\)"):
        ward_linkage(torch.tensor(normal(3, 2), device=device), weights)


def test_heights_that_overflow_float32(device):
    points = torch.tensor([[-3e38], [3e38]], dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match=r"higher than the largest torch.float32; give float64 points, or scale"):
        ward_linkage(points)
    assert ward_linkage(points.double()).heights.tolist() == pytest.approx([6e38])
