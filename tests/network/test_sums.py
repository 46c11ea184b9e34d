import pytest
import torch

from nac_gpu.network.sums import _in_order, add_rows


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("add", [add_rows, _in_order], ids=["chosen", "in order"])
def test_equals_index_add(add, dim, device):
    """CUDA's own way sums in any order; ours gives the bits of the CPU's."""
    generator = torch.Generator().manual_seed(0)
    total = torch.randn(5, 6, 7, generator=generator)
    index = torch.randint(total.shape[dim], (40,), generator=generator)
    shape = [*total.shape]
    shape[dim] = 40
    parts = torch.randn(shape, generator=generator)
    expected = total.clone().index_add_(dim, index, parts)
    there = total.to(device)
    found = add(there, dim, index.to(device), parts.to(device))
    assert found is there
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)
    again = add(total.to(device), dim, index.to(device), parts.to(device))
    assert torch.equal(found, again)
