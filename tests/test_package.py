"""The package as a user meets it."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import nac_gpu as nac


def test_importing_needs_torch_and_numpy_only_and_starts_nothing() -> None:
    code = """
import sys
import numpy, torch
import torch.utils.flop_counter
before = {name.split(".")[0] for name in sys.modules}
import nac_gpu, nac_gpu.kernels
new = {name.split(".")[0] for name in sys.modules} - before - sys.stdlib_module_names
assert new <= {"nac_gpu"}, new
assert not torch.cuda.is_initialized()
assert nac_gpu.ward_linkage(torch.rand(5, 2)).cut(2).max() == 1
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_pytorch_may_be_built_without_torch_distributed() -> None:
    code = """
import sys, types
import torch
from torch import nn
stub = types.ModuleType("torch.distributed")
stub.is_available = lambda: False
sys.modules["torch.distributed"] = torch.distributed = stub
import nac_gpu
with nac_gpu.distributed.joined(None, nn.Linear(1, 1)) as ranks:
    assert list(ranks.share("ab", str.upper)) == ["A", "B"]
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("name", nac.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    thing = getattr(nac, name)
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return
    assert thing.__doc__
    if inspect.isclass(thing):
        for attribute, value in vars(thing).items():
            if not attribute.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                assert value.__doc__, attribute


def test_the_types_are_shipped() -> None:
    assert (Path(nac.__file__).parent / "py.typed").exists()


def test_the_readmes_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in readme.split("```python\n")[1:]]
    exec(compile("".join(blocks), "README.md", "exec"), {})
    assert len(blocks) == 2
    assert "parameters: 85,002 -> " in capsys.readouterr().out
