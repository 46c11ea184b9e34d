"""Models whose weights stay in files: the same result as in memory, in less memory than the model has."""

import contextlib
import copy
import itertools
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepnet
import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import nac_gpu as nac
from nac_gpu.files.models import read
from nac_gpu.files.origin import origin_of
from nac_gpu.network.deferred import Deferred
from nac_gpu.network.state import content, is_open, tensors

transformers: Any = pytest.importorskip("transformers")
IDS = {"input_ids": torch.arange(8).reshape(1, 8)}


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, tie_word_embeddings=True, **sizes, **heads)
    return transformers.LlamaForCausalLM(config).eval()


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.BertModel(transformers.BertConfig(vocab_size=64, **sizes)).eval()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))


class Scaled(nn.Module):
    """With a number that is in no file, written into memory that was empty."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(1).fill_(0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table


def convolutions() -> nn.Module:
    """BatchNorm behind a layer, and where its slopes cannot be folded."""
    first = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), Scaled(), nn.Conv2d(16, 16, 3, groups=16)]
    model = nn.Sequential(*first, nn.ReLU(), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(72, 2))
    return model.eval()


def with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 1)
            for buffer in (module.running_mean, module.running_var):
                assert buffer is not None
                nn.init.uniform_(buffer, 0.5, 2)
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "llama": (llama, IDS),
    "bert": (bert, IDS),
    "mlp": (mlp, torch.ones(1, 12)),
    "convolutions": (convolutions, torch.ones(1, 3, 9, 9)),
}


@pytest.mark.parametrize("rule", ["restored", "centroid"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_result_is_that_of_the_model_in_memory(name: str, rule: Any, tmp_path: Path) -> None:
    factory, inputs = NETWORKS[name]
    torch.manual_seed(0)
    whole = with_statistics(factory())
    file = tmp_path / "model.safetensors"
    save_file({n: t for n, t in tensors(whole).items() if n in whole.state_dict()}, file)
    expected = nac.compress(whole, inputs, width=0.5, rule=rule, method="ward", calibration="none")
    opened = nac.open_model(factory, file)
    small = nac.compress(opened, inputs, width=0.5, rule=rule)
    made_by = origin_of(small)
    assert made_by is not None
    untried = any("loaded into memory, other ways would be tried" in line for line in made_by.plan.changes)
    assert untried == (inputs is IDS), "only what reads tokens"
    assert all(isinstance(p, Deferred) for p in small.parameters() if p.ndim > 1), "no weight was kept in memory"
    assert nac.plan(opened, inputs, width=0.5) == nac.plan(whole, inputs, width=0.5)
    nac.save(small, tmp_path / "small.safetensors")
    loaded = nac.load(tmp_path / "small.safetensors", factory)
    assert not is_open(loaded)
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def test_a_budget_is_met_by_weights_alone(tmp_path: Path) -> None:
    whole, inputs = mlp(), torch.ones(1, 12)
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    opened = nac.open_model(mlp, tmp_path)
    for budget in ({"params": 0.4}, {"flops": 0.4}):
        plan = nac.plan(opened, inputs, **budget)
        assert plan.widths == nac.plan(whole, inputs, calibration="none", **budget).widths
    with pytest.raises(ValueError, match=r"a model of nac_gpu\.open_model, expected calibration='none'"):
        nac.compress(opened, inputs, width=0.5, calibration=[inputs])
    with pytest.raises(ValueError, match=r"latency= cannot be measured on a model of nac_gpu\.open_model"):
        nac.plan(opened, inputs, latency=0.5)


def test_methods_that_remove_neurons(tmp_path: Path) -> None:
    def half(points: Tensor, k: int, *, weights: Tensor | None = None, seed: int = 0) -> Tensor:
        labels = torch.arange(len(points))
        labels[k:] = -1
        return labels

    whole, inputs = mlp(), torch.ones(1, 12)
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    expected = nac.compress(whole, inputs, width=0.5, method=half, calibration="none")
    small = nac.compress(nac.open_model(mlp, tmp_path), inputs, width=0.5, method=half)
    for key, tensor in tensors(expected).items():
        assert torch.equal(tensors(small)[key].cpu() + 0, tensor), key


def test_folders_of_hugging_face(tmp_path: Path) -> None:
    """Several files with an index; the result is a folder that `from_pretrained` opens."""
    whole: Any = llama()
    whole.save_pretrained(tmp_path / "whole", max_shard_size="20KB")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 3
    expected = nac.compress(whole, IDS, width=0.5, method="ward", calibration="none")
    small = nac.compress(nac.open_model(llama, tmp_path / "whole"), IDS, width=0.5)
    nac.save(small, tmp_path / "small")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert again.config.intermediate_size == 24
    for key, tensor in expected.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key


def write_in_place(model: nn.Sequential) -> None:
    model[0].weight.detach().mul_(2)  # type: ignore[union-attr, operator]


def write_into_a_part(model: nn.Sequential) -> None:
    model[0].weight.detach().t()[0].zero_()  # type: ignore[union-attr, operator]


def replace_data(model: nn.Sequential) -> None:
    model[0].weight.data = torch.zeros(40, 12)


def train(model: nn.Sequential) -> None:
    model(torch.ones(1, 12)).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


@pytest.mark.parametrize("write", [write_in_place, write_into_a_part, replace_data, train])
def test_what_is_in_files_cannot_be_written_to(write: Callable[[Any], None], tmp_path: Path) -> None:
    save_file(mlp().state_dict(), tmp_path / "model.safetensors")
    opened = nac.open_model(mlp, tmp_path)
    with pytest.raises(RuntimeError, match=r" writes into a tensor of the shape \([0-9, ]*\) whose values are in"):
        write(opened)
    assert "Deferred((40, 12)" in repr(opened[0].weight)  # type: ignore[index]


def test_a_model_in_files_computes_and_changes_its_type(tmp_path: Path) -> None:
    """Views, parts, copies and other types of deferred tensors are what those of the values are."""
    whole, inputs = mlp(), torch.randn(5, 2, 12)
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    opened = nac.open_model(mlp, tmp_path)
    assert nac.cost(opened, inputs) == nac.cost(whole, inputs)
    assert torch.equal(opened(inputs), whole(inputs))
    assert torch.equal(copy.deepcopy(opened)(inputs), whole(inputs))
    twice = copy.deepcopy(opened).double()
    assert all(isinstance(parameter, Deferred) and parameter.requires_grad for parameter in twice.parameters())
    assert torch.equal(twice(inputs.double()), copy.deepcopy(whole).double()(inputs.double()))
    weight, expected = opened[0].weight.detach(), whole[0].weight.detach()  # type: ignore[index]
    parts = zip(weight.split([10, 30]), expected.split([10, 30]), strict=True)
    for found, like in [(weight.t().reshape(-1), expected.t().reshape(-1)), (weight[3:5].T, expected[3:5].T), *parts]:
        assert isinstance(found, Deferred)
        assert found.stride() == like.stride()
        assert torch.equal(found.load(), like)


class Tied(nn.Module):
    """One tensor under two names, and a layer that has the weight of another."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = self.slope = nn.Parameter(torch.rand(16))
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.third.weight = self.second.weight
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.first(x) * self.scale).relu() * self.slope
        return self.last(self.third(self.second(x).relu()))


def test_ties_stay_ties(tmp_path: Path) -> None:
    whole, inputs = Tied(), torch.ones(1, 8)
    save_model(whole, tmp_path / "model.safetensors")  # tied tensors once
    opened: Any = nac.open_model(Tied, tmp_path)
    assert opened.scale is opened.slope
    assert opened.third.weight is opened.second.weight
    expected = nac.compress(whole, inputs, width=0.5, calibration="none")
    small: Any = nac.compress(opened, inputs, width=0.5)
    assert small.third.weight is small.second.weight
    nac.save(small, tmp_path / "small.safetensors")
    loaded: Any = nac.load(tmp_path / "small.safetensors", Tied)
    assert loaded.scale is loaded.slope
    for key, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


class Derived(nn.Module):
    """With tensors that are computed from parameters when it is built."""

    def __init__(self, *, registered: bool) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        nn.init.ones_(self.linear.weight)
        total = self.linear.weight.detach().sum()
        if registered:
            self.register_buffer("total", total, persistent=False)
        else:
            self.total = total

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.linear(x / self.total))


@pytest.mark.parametrize("registered", [True, False])
def test_factories_that_need_the_values_of_parameters(registered: bool, tmp_path: Path) -> None:
    whole, inputs = Derived(registered=registered), torch.ones(1, 4)
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    opened: Any = nac.open_model(lambda: Derived(registered=registered), tmp_path)
    assert float(opened.total) == 24
    assert isinstance(opened.linear.weight, Deferred)
    assert torch.equal(opened(inputs), whole(inputs))
    nac.save(nac.compress(opened, inputs, width=0.5), tmp_path / "small.safetensors")
    assert nac.load(tmp_path / "small.safetensors", lambda: Derived(registered=registered)).total == 24


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    deepnet.write_shards(tmp_path / "model", 3, 8)
    return tmp_path / "model"


def opened(folder: Path, size: int = 8, blocks: int = 3) -> nn.Module:
    return nac.open_model(lambda: deepnet.deep(blocks, size), folder)


def test_the_files_are_only_read(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.chmod(0o444)
    nac.save(nac.compress(opened(folder), torch.ones(1, 8), width=0.5), folder.parent / "small.safetensors")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_factories_that_do_not_do(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"weight": torch.ones(3, 3), "bias": torch.ones(3)}, file)
    with pytest.raises(TypeError, match=r"the factory returned int, expected a torch\.nn\.Module"):
        nac.open_model(lambda: 3, file)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="the weights of the model are computed"):
        nac.open_model(lambda: weight_norm(nn.Linear(3, 3)), [file])

    def without_values() -> nn.Module:
        model = nn.Linear(3, 3)
        model.register_buffer("table", torch.ones(3, device="meta"), persistent=False)
        return model

    with pytest.raises(ValueError, match="the buffer table has no values and is in no file"):
        nac.open_model(without_values, file)


@contextlib.contextmanager
def changed_file(folder: Path) -> Iterator[None]:
    os.truncate(folder / "2.safetensors", 100)
    yield


@contextlib.contextmanager
def full_disk(_: Path) -> Iterator[None]:
    """Files may not become longer than a part of what is written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def interrupted(_: Path) -> Iterator[None]:
    """Ctrl-C while the fourth tensor is written."""
    calls = itertools.count()

    def written(tensor: Tensor) -> memoryview:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return content(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nac_gpu.files.shards.content", written)
        yield


@pytest.mark.parametrize(
    ("failing", "error", "message"),
    [
        (changed_file, OSError, r"small\.safetensors could not be written: .*was changed since"),
        (full_disk, OSError, r"small\.safetensors could not be written: .*File too large"),
        (interrupted, KeyboardInterrupt, "^$"),
    ],
)
def test_the_old_file_stays_where_saving_fails(
    failing: Callable[[Path], Any], error: type[BaseException], message: str, folder: Path
) -> None:
    small = nac.compress(opened(folder), torch.ones(1, 8), width=0.5)
    target = folder.parent / "out" / "small.safetensors"
    target.parent.mkdir()
    target.write_text("old")
    with failing(folder), pytest.raises(error, match=message):
        nac.save(small, target)
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


BLOCKS, SIZE = 32, 2048


@pytest.fixture
def large(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    count = deepnet.write_shards(tmp_path / "large", BLOCKS, SIZE)
    yield tmp_path / "large", count
    shutil.rmtree(tmp_path / "large")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and counts the memory as Linux does")
def test_a_model_of_four_times_the_allowed_memory(large: tuple[Path, int]) -> None:
    """The address space may grow by a quarter of the weights: enough block by block, and the result is the same."""
    folder, count = large
    assert count > 500e6

    def run(way: str) -> "subprocess.CompletedProcess[str]":
        arguments = [way, str(folder), str(BLOCKS), str(SIZE), str(count // 4)]
        command = [sys.executable, deepnet.__file__, *arguments]
        return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)

    failed = run("in memory")
    assert failed.returncode == 3, failed.stderr
    assert "allocate memory" in failed.stdout
    done = run("open")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) < count / 4
    manifest, state = read(folder.parent / "open.safetensors")
    assert set(manifest["widths"].values()) == {SIZE // 8}
    whole = deepnet.in_memory(folder, BLOCKS, SIZE)
    expected = nac.compress(whole, torch.ones(1, SIZE), width=0.25, calibration="none").state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    (folder.parent / "open.safetensors").unlink()
