"""What is exported computes what the model computes, for batches of any size."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nac_gpu as nac


class Named(nn.Module):
    """Keyword arguments, and several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        hidden = torch.relu(self.left(x))
        scores = self.right(hidden)
        return {"scores": scores if scale is None else scores * scale, "hidden": hidden}


def small() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nac.compress(nn.Sequential(*layers), torch.randn(1, 3, 8, 8), width=0.5, calibration="none")


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_files_run(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"small{suffix}"
    model = small().train()
    assert nac.export(model, path, torch.randn(1, 3, 8, 8)) < 1e-5
    assert model.training
    assert list(tmp_path.iterdir()) == [path]
    if suffix == ".pt2":
        program: Any = torch.export.load(path).module()
        images = torch.randn(5, 3, 8, 8)
        assert torch.allclose(program(images), model.eval()(images), atol=1e-5)


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_keyword_arguments_and_several_outputs(suffix: str, tmp_path: Path) -> None:
    inputs = {"scale": torch.rand(2, 1), "x": torch.randn(2, 4)}  # in another order than forward's
    assert nac.export(Named(), tmp_path / f"x{suffix}", inputs) < 1e-5
    assert nac.export(Named(), tmp_path / f"y{suffix}", [torch.randn(2, 4)], dynamic_batch=False) < 1e-5


def test_what_deviates_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.pt2"
    nac.export(small(), path, torch.randn(1, 3, 8, 8))
    before = path.read_bytes()
    monkeypatch.setattr(
        sys.modules["nac_gpu.files.exporting"],
        "_program",
        lambda _: lambda args, kwargs: [torch.zeros(len(args[0]), 4)],
    )
    with pytest.raises(ValueError, match=r"deviate by 1\.0e\+00, expected at most 1e-04"):
        nac.export(small(), path, torch.randn(1, 3, 8, 8))
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match=r"ends in \.pth, expected \.pt2 or \.onnx"):
        nac.export(small(), tmp_path / "small.pth", torch.randn(1, 3, 8, 8))


def test_what_cannot_be_exported_is_explained(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if bool(x.sum() > 0) else -x

    with pytest.raises(ValueError, match="Branches cannot be exported: "):
        nac.export(Branches(), tmp_path / "x.pt2", torch.randn(2, 3))
    assert not list(tmp_path.iterdir())
