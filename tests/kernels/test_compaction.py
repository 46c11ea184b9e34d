import numpy as np
import pytest
import torch

from nac_gpu.kernels import compact


@pytest.mark.parametrize(
    ("m", "left"), [(1, 1), (2, 1), (65, 64), (123, 3), (1500, 1100), (1500, 1500)], ids=lambda value: str(value)
)
def test_equals_numpy(m, left, device):
    rng = np.random.default_rng(m)
    costs = rng.uniform(size=(m, m))
    keep = np.sort(rng.permutation(m)[:left])
    packed = compact(torch.tensor(costs, device=device), torch.tensor(keep, device=device))
    assert packed.is_contiguous()
    np.testing.assert_array_equal(packed.cpu(), costs[np.ix_(keep, keep)])


@pytest.mark.parametrize("front", [True, False])
def test_rows_kept_from_one_end(front, device):
    costs = torch.rand(1000, 1000, dtype=torch.float64).to(device)
    keep = torch.arange(0, 600, device=device) if front else torch.arange(400, 1000, device=device)
    expected = costs[keep][:, keep]
    assert torch.equal(compact(costs, keep), expected)
