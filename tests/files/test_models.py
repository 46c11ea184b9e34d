"""Files bring compressed models back; damage, foreign files and full disks are errors, and the old file stays."""

import inspect
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from networks import network
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

import nac_gpu as nac
from nac_gpu.files.atomic import atomically, atomically_folder
from nac_gpu.files.models import read


def factory() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 36, 4))


INPUTS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    return nac.compress(factory().eval(), INPUTS, width=0.5, calibration="none")


@pytest.fixture
def path(small: nn.Module, tmp_path: Path) -> Path:
    nac.save(small, tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def test_a_file_brings_the_model_back(small: nn.Module, path: Path) -> None:
    state = torch.get_rng_state()
    loaded = nac.load(str(path), factory)
    assert torch.equal(loaded(INPUTS), small(INPUTS))
    assert not loaded.training
    assert loaded[0].out_channels == 6
    torch.set_rng_state(state)
    assert set(load_file(path)) == set(small.state_dict()), "any program of safetensors reads it"
    manifest, _ = read(path)
    assert manifest["widths"] == {"0": 6}
    assert manifest["version"] == nac.__version__
    assert list(path.parent.iterdir()) == [path], "nothing is left beside it"


def test_a_trained_and_again_compressed_model_comes_back(small: nn.Module, tmp_path: Path) -> None:
    """The original is the first one."""
    nac.finetune(small, [(INPUTS, torch.tensor([0, 1]))], learning_rate=0.1)
    again = nac.compress(small, INPUTS, width=0.5, calibration="none").to(torch.bfloat16)
    nac.save(torch.compile(again), tmp_path / "again.safetensors")  # type: ignore[arg-type]
    loaded = nac.load(tmp_path / "again.safetensors", factory)
    assert loaded[0].out_channels == 3
    assert torch.equal(loaded(INPUTS.bfloat16()), again(INPUTS.bfloat16()))
    assert nac.compress(loaded, INPUTS.bfloat16(), width={"0": 2}, calibration="none")[0].out_channels == 2


def saved(model: nn.Module, path: Path, build: Callable[[], nn.Module]) -> nn.Module:
    nac.save(model, path)
    return nac.load(path, build)


def test_parametrisations_ties_and_frozen_parameters(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(weight_norm(nn.Linear(6, 10)), nn.ReLU(), nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 3))
        model.add_module("5", nn.Linear(3, 3))
        model[5].bias = model[4].bias
        model[4].requires_grad_(False)
        return model

    inputs = torch.randn(3, 6)
    small = nac.compress(build(), inputs, width=0.5, calibration="none")
    loaded = saved(small, tmp_path / "x.safetensors", build)
    assert torch.equal(loaded(inputs), small(inputs))
    assert loaded[5].bias is loaded[4].bias
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in small.parameters()]
    assert not hasattr(loaded[0], "parametrizations")


class DividedByLargest(nn.Module):
    """A parametrisation that decides by values."""

    def forward(self, weight: Tensor) -> Tensor:
        largest = float(weight.detach().abs().max())
        return weight / largest if largest > 1 else weight


def divided(layer: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, "weight", DividedByLargest())
    return layer


def masked(layer: nn.Module) -> nn.Module:
    return nn.utils.prune.l1_unstructured(layer, "weight", 0.3)


@pytest.mark.parametrize(
    "way",
    [
        orthogonal,
        partial(orthogonal, orthogonal_map="cayley"),
        partial(orthogonal, use_trivialization=False),
        spectral_norm,
        nn.utils.spectral_norm,
        divided,
        masked,
    ],
)
def test_factories_with_weights_that_are_computed(way: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(way(nn.Linear(6, 16)), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), way(nn.Linear(10, 3)))

    inputs = torch.randn(3, 6)
    small = nac.compress(build().eval(), inputs, width=0.5, calibration="none")
    loaded = saved(small, tmp_path / "x.safetensors", build)
    assert torch.equal(loaded(inputs), small(inputs))


@pytest.mark.parametrize("name", ["dbn", "cnn"])
def test_devices_and_dtypes(name: str, tmp_path: Path) -> None:
    model, inputs = network(name)
    small = nac.compress(model.double(), inputs.double(), width=0.5, calibration="none")
    loaded = saved(small, tmp_path / "x.safetensors", lambda: network(name)[0])
    assert torch.equal(loaded(inputs.double()), small.eval()(inputs.double()))
    meta = nac.load(tmp_path / "x.safetensors", lambda: network(name)[0].to("meta"))
    assert torch.equal(meta(inputs.double()), loaded(inputs.double())), "the factory's weights do not matter"


def damaged(path: Path, change: Callable[[bytearray], bytearray]) -> Path:
    path.write_bytes(change(bytearray(path.read_bytes())))
    return path


def flipped(content: bytearray, place: int) -> bytearray:
    content[place] ^= 1
    return content


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:4],
        lambda content: flipped(content, len(content) - 5),
        lambda content: flipped(content, content.index(b"nac_gpu") + 60),
        lambda content: content + b"more",
        lambda content: bytearray(b"PK\x03\x04 not safetensors at all"),
        lambda content: bytearray(),
    ],
    ids=["half", "head", "tensor", "manifest", "longer", "foreign", "empty"],
)
def test_damage_is_noticed(path: Path, change: Callable[[bytearray], bytearray]) -> None:
    with pytest.raises(ValueError, match=r"damaged|not a safetensors file|no manifest"):
        nac.load(damaged(path, change), factory)


def test_every_single_bit_counts(path: Path) -> None:
    content = path.read_bytes()
    places = range(0, len(content), max(1, len(content) // 150))
    for place in places:
        path.write_bytes(bytes(flipped(bytearray(content), place)))
        with pytest.raises(ValueError, match=r"small\.safetensors"):
            nac.load(path, factory)


def rewritten(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    """A file whose hash is right, with another manifest."""
    from nac_gpu.files.models import _digest

    manifest, values = read(path)
    change(manifest)
    text = json.dumps(manifest)
    save_file(values, path, {"format": "pt", "nac_gpu": text, "nac_gpu_sha256": _digest(text, values)})


def test_other_files_and_factories_are_explained(path: Path, small: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        nac.load(tmp_path / "none.safetensors", factory)
    save_file(small.state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="no manifest of nac_gpu, expected a file that"):
        nac.load(tmp_path / "plain.safetensors", factory)
    with pytest.raises(ValueError, match=r"0\.weight of the shape \(12, 3, 3, 3\), but the factory's has None"):
        nac.load(path, lambda: nn.Identity())
    with pytest.raises(ValueError, match=r"4\.weight of the shape \(4, 432\), but the factory's has \(5, 432\)"):
        nac.load(path, lambda: nn.Sequential(*list(factory())[:4], nn.Linear(432, 5)))
    rewritten(path, lambda manifest: manifest["attributes"]["0"].update(forward=1))  # type: ignore[index]
    with pytest.raises(ValueError, match="has no attribute forward like 1"):
        nac.load(path, factory)
    rewritten(path, lambda manifest: manifest.pop("plan"))
    with pytest.raises(ValueError, match="its manifest lacks or spoils 'plan'"):
        nac.load(path, factory)
    rewritten(path, lambda manifest: manifest.update(format=2, version="9.9"))
    with pytest.raises(ValueError, match=r"format 2, written by nac_gpu 9\.9; this version reads format 1: upgrade"):
        nac.load(path, factory)


def test_what_cannot_be_saved_is_explained(small: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Sequential was not made by nac_gpu\.compress"):
        nac.save(factory(), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"does not end in \.safetensors"):
        nac.save(small, tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


FULL = """
import resource, signal
from torch import nn
import nac_gpu as nac
small = nac.load({path!r}, lambda: eval({factory!r}))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
nac.save(small, {path!r})
"""

KILLED = """
from torch import nn
import nac_gpu as nac
small = nac.load({path!r}, lambda: eval({factory!r}))
print("begin", flush=True)
while True:
    nac.save(small, {path!r})
"""


def started(script: str, path: Path) -> "subprocess.Popen[str]":
    text = script.format(path=str(path), factory=inspect.getsource(factory).split("return ")[1])
    command = [sys.executable, "-c", text]
    return subprocess.Popen(command, cwd=path.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_full_disk_is_an_error_and_the_old_file_stays(path: Path, small: nn.Module) -> None:
    before = path.read_bytes()
    process = started(FULL, path)
    _, errors = process.communicate()
    assert process.returncode != 0
    assert "OSError" in errors.splitlines()[-1]
    assert "small.safetensors could not be written" in errors
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_killed_save_leaves_a_whole_file(path: Path) -> None:
    process = started(KILLED, path)
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    for _ in range(20):
        time.sleep(0.01)
        assert nac.load(path, factory)[0].out_channels == 6
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert nac.load(path, factory)[0].out_channels == 6


def test_writing_that_fails_leaves_what_was(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "file"
    with atomically(file) as partial:
        partial.write_text("old")
    with pytest.raises(TypeError), atomically(file) as partial:
        partial.write_bytes("new")  # type: ignore[arg-type]
    assert file.read_text() == "old"
    with pytest.raises(FileExistsError, match="exists already"), atomically_folder(file.parent):
        pass
    with atomically_folder(tmp_path / "other") as partial:
        (partial / "file").write_text("x")
    assert (tmp_path / "other" / "file").read_text() == "x"
    assert {entry.name for entry in tmp_path.iterdir()} == {"folder", "other"}
