"""Old names keep working through this release: of pickled models, and of the package."""

import io
import pickle
import sys
import warnings

import pytest
import torch
from torch import nn

import nac_gpu as nac
from nac_gpu import moved


def as_written_before(model: nn.Module) -> bytes:
    """The pickle of a compressed model as the version wrote it whose modules stood side by side."""
    data = pickle.dumps(model, protocol=0)
    for new, old in (
        ("nac_gpu.network.attention", "nac_gpu.attention"),
        ("nac_gpu.network.costs", "nac_gpu.cost"),
        ("nac_gpu.tracing.graph", "nac_gpu.groups"),
        ("nac_gpu.files.origin", "nac_gpu.origin"),
        ("nac_gpu.planning.plans", "nac_gpu.plan"),
    ):
        data = data.replace(new.encode(), old.encode())
    return data


def test_pickled_models_of_before_are_read_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 16), layer, nn.Linear(16, 3)).eval()
    x = torch.randn(2, 5, 8)
    small = nac.compress(model, x, width=0.5, calibration="none")
    data = as_written_before(small)
    assert b"nac_gpu.plan\n" in data
    assert b"nac_gpu.attention\n" in data
    monkeypatch.setattr(moved, "_warned", False)
    with pytest.warns(FutureWarning, match="pickled by an earlier version") as said:
        read = pickle.load(io.BytesIO(data))
    assert len(said) == 1
    assert torch.equal(read(x), small(x))
    assert read._nac_gpu_origin == small._nac_gpu_origin
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pickle.load(io.BytesIO(data))  # once is enough
    assert callable(nac.plan)
    assert callable(nac.cost)


def test_every_class_is_where_the_old_name_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moved, "_warned", True)
    for module, classes in moved._CLASSES.items():
        for name in classes:
            assert getattr(sys.modules[f"nac_gpu.{module}"], name).__name__ == name


@pytest.mark.parametrize("name", ["ward", "kmeans", "random", "METHODS"])
def test_methods_are_still_found_in_the_package(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"nac_gpu\.{name} is now nac_gpu\.methods\.{name}"):
        assert getattr(nac, name) is getattr(nac.methods, name)


def test_what_never_was_is_not_found() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        getattr(nac, "no_such_name")  # noqa: B009 -- no such attribute is written down
    with pytest.raises(AttributeError, match=r"nac_gpu\.plan is gone"):
        getattr(sys.modules["nac_gpu.plan"], "no_such_name")  # noqa: B009 -- the same
