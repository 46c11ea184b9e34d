"""The public tools for tests of models."""

import pytest
import torch
from torch import Tensor, nn

import nac_gpu as nac


class OnlyInFloat32(nn.Module):
    """As grouped products of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("Expected mat_a to be Float32")
        return self.down(self.up(x).relu())


def test_a_model_that_does_not_run_in_float64_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"does not run in float64, .* Expected mat_a to be Float32; choose another"):
        nac.testing.check_copies(OnlyInFloat32().eval(), torch.randn(4, 6))
    assert nac.plan(OnlyInFloat32().eval(), torch.randn(4, 6), width=0.5).groups  # compressed nevertheless


def test_where_copies_move_nothing_nothing_was_tested() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    nn.init.zeros_(model[2].weight)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=r"nothing was tested; call nac_gpu\.testing\.randomise"):
        nac.testing.check_copies(model, torch.randn(4, 6))
    assert nac.testing.check_copies(nac.testing.randomise(model), torch.randn(4, 6)).error < 1e-8
