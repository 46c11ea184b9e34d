"""Fixtures for all tests."""

import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device at hand: the same tests run on a GPU where there is one."""
    return torch.device(request.param)
