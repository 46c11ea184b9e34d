"""Fixtures for all tests."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
# `python -m pytest` looks into the current folder first, where nac_gpu lacks its kernels: what is installed is tested.
sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != ROOT]

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before nac_gpu is imported
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask for on CUDA

DEVICES = ["cpu", *(["cuda"] if CUDA else [])]
PLACES = [("cuda", "triton"), ("cuda", "torch"), ("cpu", "torch")] if CUDA else [("cpu", "triton"), ("cpu", "torch")]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device at hand: the same tests run on a GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture(params=PLACES, ids="-".join)
def place(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every device with each implementation of the kernels: compiled on a GPU, or else interpreted; and the twins.

    New memory is filled with NaN and huge numbers, so that nobody reads what nobody wrote.
    """
    from nac_gpu.kernels import use_backend

    device, backend = request.param
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    with use_backend(backend):
        yield torch.device(device)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def short_dreams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs dreamed up in a moment: few and bad ones, for tests of the default way that do not ask how good it is."""
    from nac_gpu.calibration import dream

    for name, value in (("BATCH", 8), ("COUNT", 16), ("POSITIONS", 64), ("STEPS", 2)):
        monkeypatch.setattr(dream, name, value)


@pytest.fixture(autouse=True)
def short_refinement(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps of refinement, for tests that do not ask how good it is."""
    from nac_gpu.merging import refinement

    if request.module.__name__ != "test_refinement":
        monkeypatch.setattr(refinement, "STEPS", 8)


@pytest.fixture(scope="module")
def made() -> Any:
    """A model, what it became, example inputs, the plan and the report."""
    from reports import made_report

    return made_report()
