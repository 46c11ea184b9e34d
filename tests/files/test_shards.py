"""Safetensors files, one tensor at a time: what is in them, and what is wrong with them."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import deepnet
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nac_gpu as nac
from nac_gpu.files.shards import entries, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    deepnet.write_shards(tmp_path / "model", 3, 8)
    return tmp_path / "model"


def opened(folder: Path, size: int = 8, blocks: int = 3) -> nn.Module:
    return nac.open_model(lambda: deepnet.deep(blocks, size), folder)


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(state)
    save_file(state, file)


def test_files_that_are_missing_or_damaged(folder: Path) -> None:
    file = folder / "1.safetensors"
    content = file.read_bytes()
    for length in (0, 20, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"1\.safetensors .*cut off.*download or copy it again"):
            opened(folder)
    file.write_bytes(content[:8] + b"[" + content[9:])
    with pytest.raises(ValueError, match=r"1\.safetensors is not a safetensors file"):
        opened(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.safetensors is missing, one of 3 files, with 1\."):
        opened(folder)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        opened(folder / "none")
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no files that end in \.safetensors; save the model with"):
        opened(folder / "empty")


@pytest.mark.parametrize("length", [100, 10**6])
def test_a_file_that_changes_while_in_use(length: int, folder: Path) -> None:
    model = opened(folder)
    os.truncate(folder / "2.safetensors", length)
    with pytest.raises(OSError, match=r"2\.safetensors was changed since it was opened; open the model again"):
        nac.plan(model, torch.ones(1, 8), width=0.5)


def test_tensors_that_do_not_fit(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"0\.norm\.weight has the shape \(8,\) in .*, but the factory's has \(10,\)"):
        opened(folder, size=10)
    with pytest.raises(ValueError, match=r"the files lack 3\.norm\.weight \(8,\), the first of 6 tensors.*give all fi"):
        opened(folder, blocks=4)
    with pytest.raises(ValueError, match=r"the factory's model lacks 2\.\w+\.\w+ .*, the first of 6 tensors"):
        opened(folder, blocks=2)
    rewrite(folder / "1.safetensors", lambda state: state.pop("1.up.bias"))
    with pytest.raises(ValueError, match=r"1\.safetensors lacks 1\.up\.bias, which model\.safetensors\.index\.json"):
        opened(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="is not the index of a model, it lacks or spoils 'weight_map'"):
        opened(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"the files lack 1\.up\.bias \(4,\), the first of 1 tensors"):
        opened(folder)
    rewrite(folder / "1.safetensors", lambda state: state.update({"0.up.bias": torch.zeros(4)}))
    with pytest.raises(ValueError, match=r"0\.up\.bias is in .*0\.safetensors and in .*1\.safetensors"):
        opened(folder)


def test_every_type_of_number_comes_back(tmp_path: Path) -> None:
    """Types of all widths in one file: what safetensors writes is read, and the other way round."""
    types = (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
    state = {str(dtype): torch.arange(3).to(dtype) for dtype in types} | {"nothing": torch.empty(0, 2)}
    save_file(state, tmp_path / "x.safetensors")
    for name, entry in entries(tmp_path).items():
        assert torch.equal(entry.read(), state[name])
        assert entry.read().dtype == state[name].dtype
    write(tmp_path / "y.safetensors", state, {"format": "pt"})
    found = load_file(tmp_path / "y.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
