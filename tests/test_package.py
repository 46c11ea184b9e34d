"""The package as a user meets it."""

import inspect
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import nac_gpu as nac


def test_importing_needs_torch_and_numpy_only_and_starts_nothing(tmp_path: Path) -> None:
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
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=tmp_path)


def test_pytorch_may_be_built_without_torch_distributed(tmp_path: Path) -> None:
    code = """
import sys, types
import torch
from torch import nn
stub = types.ModuleType("torch.distributed")
stub.is_available = lambda: False
sys.modules["torch.distributed"] = torch.distributed = stub
import nac_gpu
from nac_gpu.distributed.ranks import joined
with joined(None, nn.Linear(1, 1)) as ranks:
    assert list(ranks.share("ab", str.upper)) == ["A", "B"]
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=tmp_path)


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


def tracked(root: Path) -> set[str]:
    """What git tracks, but for what only a clone needs; nothing where there is no clone."""
    if not (root / ".git").exists():
        return set()
    done = subprocess.run(["git", "-C", root, "ls-files"], check=True, capture_output=True, text=True)
    return {name for name in done.stdout.splitlines() if not name.startswith(".git")}


def test_wheel_and_sdist_hold_all_that_is_needed(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "runs", "__pycache__", "data")
    shutil.copytree(root, source, ignore=ignored)
    shutil.copytree(root / ".ci", source / ".ci")
    shutil.copy(root / ".pre-commit-config.yaml", source)
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", tmp_path / "dist", source], check=True, capture_output=True
    )
    (wheel,), (sdist,) = (list((tmp_path / "dist").glob(kind)) for kind in ("*.whl", "*.tar.gz"))
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = ("tests/conftest.py", "tests/support/states.py", "experiments/common/models.py", "docs/tutorial.md")
    assert set(expected) | {"kernels/merging.py", "CHANGELOG.md", "Makefile", "README.md", "LICENSE"} <= names
    assert tracked(root) - names == set()
    command = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "installed", wheel]
    subprocess.run([sys.executable, *command], check=True)
    code = """
import nac_gpu, nac_gpu.kernels, torch
from importlib.metadata import version
from pathlib import Path
here = Path(nac_gpu.__file__).parent
assert here.parent.name == "installed", here
assert (here / "py.typed").exists() and (here / "reporting" / "page.css").exists()
assert version("nac-gpu") == nac_gpu.__version__
assert nac_gpu.ward_linkage(torch.rand(5, 2)).cut(2).max() == 1
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    assert (tmp_path / "installed" / "bin" / "nac").exists()
