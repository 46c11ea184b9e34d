"""Several processes: they get the same model as one, bit for bit, and no one waits for the dead."""

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

import nac_gpu as nac
from common.data import Images
from common.training import Extras, Precision, Recipe, fit
from nac_gpu.clustering.methods import ward
from nac_gpu.distributed import heartbeat, replicas
from nac_gpu.distributed import ranks as group_of_ranks
from nac_gpu.distributed.consistency import digest
from nac_gpu.distributed.ranks import joined
from nac_gpu.planning import latency

IMAGE, VECTOR = torch.zeros(1, 3, 8, 8), torch.zeros(1, 6)
WAIT = 3.0  # seconds after which a rank is taken for dead here
VICTIM = 1  # the rank that dies


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.ReLU())
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(40, 12), nn.ReLU(), nn.Linear(12, 4))


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU())
    return nn.Sequential(*first, nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4))


def trained(model: nn.Module, seed: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(3):
        model(drawn(16, 6, seed=100 * seed + step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def bits(model: nn.Module) -> str:
    return digest(model.state_dict())


def refused(work: Callable[[], Any]) -> tuple[str, str]:
    """What is raised: its class and its text."""
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def data_parallel(rank: int, world: Any) -> dict[str, Any]:
    model = nn.parallel.DistributedDataParallel(layers())
    trained(model, rank)
    statistics = bits(model)
    plan = nac.plan(model, VECTOR, width=0.5, process_group=world)
    small = nac.compress(model, VECTOR, plan, process_group=world)
    found = {
        "statistics": statistics,
        "untouched": bits(model) == statistics,
        "together": bits(small),
        "changes": plan.changes,
        "inside": refused(lambda: nac.plan(model.module, VECTOR, width=0.5, process_group=world)),
    }
    if rank == 0:
        found["alone"] = bits(nac.compress(model, VECTOR, plan))
    wrapped = nn.parallel.DistributedDataParallel(small.train())
    trained(wrapped, rank)
    return found | {"finetuned": digest(list(small.parameters())), "moved": bits(small) != found["together"]}


def calibration(rank: int, world: Any) -> dict[str, Any]:
    size = dist.get_world_size()
    parts = [[drawn(8, 3, 8, 8, seed=10 * part + batch) for batch in range(1 + part % 2)] for part in range(size)]
    whole = [batch for part in parts for batch in part]
    model, found = convolutions(), {}

    def seconds(model: nn.Module, small: nn.Module, *_: Any) -> tuple[np.ndarray, np.ndarray]:
        assert rank == 0, "the others take its word"
        whole, kept = nac.cost(model, IMAGE).flops, nac.cost(small, IMAGE).flops
        return np.full(5, float(whole)), np.full(5, kept + 0.1 * whole)

    latency.seconds_in_turn = seconds
    for name, given, options in (
        ("budget", parts[rank], {"params": 0.5}),
        ("time", parts[rank], {"latency": 0.6, "multiple_of": 1}),
        ("shares", parts[rank], {"width": 0.5, "method": "kmeans"}),
        ("same data", whole, {"width": 0.5}),
        ("weights", "none", {"flops": 0.5}),
    ):
        found[name] = bits(nac.compress(model, IMAGE, calibration=given, process_group=world, **options))
        if rank == 0:
            alone = whole if isinstance(given, list) else given
            found[f"{name}, alone"] = bits(nac.compress(model, IMAGE, calibration=alone, **options))
    return found


def sharded(rank: int, world: Any) -> dict[str, Any]:
    model = layers()
    model[0].register_forward_hook(lambda *_: None)
    fully_shard(model[3])
    fully_shard(model)
    kinds, alone = [type(module) for module in model.modules()], refused(lambda: nac.plan(model, VECTOR, width=0.5))
    plan = nac.plan(model, VECTOR, width=0.5, process_group=world)
    small = nac.compress(model, VECTOR, plan, process_group=world)
    unchanged = [type(module) for module in model.modules()] == kinds
    unchanged &= all(isinstance(parameter, DTensor) for parameter in model.parameters())
    trained(model, rank)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ways: dict[str, ParallelStyle] = {"3": ColwiseParallel(), "5": RowwiseParallel()}
    parallel = parallelize_module(layers(), mesh, ways)
    return {
        "together": bits(small),
        "tensor parallel": bits(nac.compress(parallel, VECTOR, width=0.5, process_group=world)),
        "plain": bits(nac.compress(layers(), VECTOR, width=0.5)),
        "changes": plan.changes,
        "alone": alone,
        "classes": {type(module).__name__ for module in small.modules()},
        "hooks": len(small[0]._forward_hooks) + len(small._forward_pre_hooks),  # type: ignore[index]
        "unchanged": unchanged,
        "trains": digest(layers()[5].weight) != digest(model[5].weight.full_tensor()),  # type: ignore[union-attr]
    }


def differing(rank: int, world: Any) -> dict[str, Any]:
    last = rank == dist.get_world_size() - 1

    def raising(points: Tensor, k: int, *, weights: Tensor | None = None, seed: int = 0) -> Tensor:
        if last:
            raise OSError("the disc is full")
        return ward(points, k, weights=weights, seed=seed)

    def other(points: Tensor, k: int, *, weights: Tensor | None = None, seed: int = 0) -> Tensor:
        places = torch.arange(len(points))
        return places * k // len(points) if rank else places % k

    def compress(model: nn.Module | None = None, **options: Any) -> nn.Module:
        options = {"width": 0.5, "calibration": "none", **options}
        return nac.compress(model or layers(), VECTOR, process_group=world, **options)

    changed = layers()
    if last:
        changed[3].weight.data[0, 0] += 1
    found: dict[str, Any] = {
        "weights": refused(lambda: compress(changed)),
        "classes": refused(lambda: compress(nn.Sequential(layers(), nn.Tanh() if last else nn.ReLU()))),
        "width": refused(lambda: compress(width=0.25 if last else 0.5)),
        "rule": refused(lambda: compress(rule="centroid" if last else "restored")),
        "everywhere": refused(lambda: compress(width=2.0)),
        "raises": refused(lambda: compress(method=raising)),
        "not the same": refused(lambda: compress(method=other)),
    }
    hardware = replicas.hardware
    replicas.hardware = lambda model: f"{rank}, {hardware(model)}"
    found["other hardware"] = bits(compress(method=other))
    replicas.hardware = hardware
    if rank == 0:
        found["first"] = bits(nac.compress(layers(), VECTOR, width=0.5, calibration="none", method=other))
    return found


def plainly_trained(checkpoint: Path | None = None) -> tuple[nn.Module, list[float]]:
    """A network that no process can tell its part of a batch by: without BatchNorm and dropout."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.ReLU(), nn.Linear(12, 2))
    pixels = torch.randint(0, 256, (60, 3, 4, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    images = Images(pixels, (pixels[:, 0].float().mean((1, 2)) > 128).long(), 2)
    how = Recipe(epochs=3, learning_rate=0.1, batch_size=16, flip=True)
    precision, extras = Precision(torch.device("cpu"), False), Extras(checkpoint=checkpoint)
    errors = fit(model, images, images, how, precision, seed=0, label="", extras=extras)
    return model, errors


def experiment(rank: int, world: Any) -> dict[str, Any]:
    """How the experiments train: on parts of the same batches; stopped once, and going on from what rank 0 wrote."""
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder, 0)
        path = Path(folder[0]) / "checkpoint.pt"
        with mock.patch("common.training.error_rate", side_effect=[98.0, 99.0, KeyError("stop")]):
            stopped = refused(lambda: plainly_trained(path))
        model, errors = plainly_trained(path)
        dist.barrier()  # until all have read rank 0's folder
    return {"stopped": stopped, "state": model.state_dict(), "errors": errors}


class Moody(nn.Sequential):
    """On the last rank it does not run with gradients."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and dist.get_rank() == dist.get_world_size() - 1:
            raise RuntimeError("no gradients here")
        return super().forward(input)


def falling_back(rank: int, world: Any) -> dict[str, Any]:
    plan = nac.plan(Moody(*layers()), VECTOR, params=0.5, process_group=world)
    return {"changes": plan.changes, "small": bits(nac.compress(Moody(*layers()), VECTOR, plan, process_group=world))}


def dying(rank: int, world: Any) -> dict[str, Any]:
    """Of four ranks one is killed while it does its part, of two one is frozen while it does what all do."""
    frozen = dist.get_world_size() == 2

    def deadly(points: Tensor, k: int, *, weights: Tensor | None = None, seed: int = 0) -> Tensor:
        if rank == VICTIM:
            os.kill(os.getpid(), signal.SIGSTOP if frozen else signal.SIGKILL)
        return ward(points, k, weights=weights, seed=seed)

    start = time.monotonic()
    known = "none" if frozen else [drawn(8, 6, seed=1)]
    options: dict[str, Any] = {"width": 0.5, "calibration": known, "process_group": world}
    error = refused(lambda: nac.compress(layers(), VECTOR, method=deadly, **options))
    return {"error": error, "seconds": time.monotonic() - start}


SCENARIOS = (data_parallel, calibration, sharded, differing, experiment, falling_back)


def worker(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    group_of_ranks.TIMEOUT = heartbeat.TIMEOUT = timedelta(seconds=60)  # a busy machine is not a dead one
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    found = {scenario.__name__: scenario(rank, dist.group.WORLD) for scenario in SCENARIOS}
    torch.save(found, f"{folder}/{rank}.pt")
    group_of_ranks.TIMEOUT = heartbeat.TIMEOUT = timedelta(seconds=WAIT)
    torch.save(dying(rank, dist.new_group(list(range(size)))), f"{folder}/{rank}-end.pt")
    os._exit(0)  # there is nobody to say goodbye to


@contextlib.contextmanager
def workers(size: int, folder: Path) -> Iterator[None]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "common.training"])
    processes = [context.Process(target=worker, args=(rank, size, str(folder))) for rank in range(size)]
    try:
        for process in processes:
            process.start()
        end = time.monotonic() + 180  # for all of them: what one waits for, the others may wait for too
        for rank, process in enumerate(processes):
            if rank != VICTIM:
                process.join(max(0.0, end - time.monotonic()))
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


Found = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found]:
    """What each rank found, and how the others went on when one died."""
    folder = tmp_path_factory.mktemp("ranks")
    with workers(request.param, folder):
        found = [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]
        ends = [torch.load(folder / f"{rank}-end.pt") for rank in range(request.param) if rank != VICTIM]
    return found, ends


def of(results: tuple[Found, Found], name: str) -> Found:
    return [found[name] for found in results[0]]


def test_data_parallel_training_ends_in_one_model(results: tuple[Found, Found]) -> None:
    found = of(results, "data_parallel")
    assert len({one["statistics"] for one in found}) == len(found)  # BatchNorm saw other data on each rank
    assert {one["together"] for one in found} == {found[0]["alone"]}
    assert {one["finetuned"] for one in found} == {found[0]["finetuned"]}
    assert all(one["moved"] and one["untouched"] for one in found)
    for one in found:
        assert "buffers: rank 0's, as DistributedDataParallel takes them" in one["changes"]
        assert one["inside"][0] == "ValueError"
        assert "rank 1 holds another model than rank 0: 1.running_mean differs" in one["inside"][1]
        assert "give the DistributedDataParallel module itself" in one["inside"][1]


@pytest.mark.parametrize("name", ["budget", "shares", "same data", "weights"])
def test_parts_of_calibration_data_count_as_their_union(results: tuple[Found, Found], name: str) -> None:
    found = of(results, "calibration")
    assert {one[name] for one in found} == {found[0][f"{name}, alone"]}


def test_sharded_parameters_are_put_together(results: tuple[Found, Found]) -> None:
    for one in of(results, "sharded"):
        assert one["together"] == one["plain"] == one["tensor parallel"]
        assert one["classes"] == {"Sequential", "Linear", "BatchNorm1d", "ReLU"}
        assert one["hooks"] == 1  # the user's
        assert one["unchanged"]
        assert one["trains"]
        assert one["changes"][0].startswith("8 tensors divided among ranks were put together")
        assert one["alone"][0] == "ValueError"
        assert "process_group=torch.distributed.group.WORLD" in one["alone"][1]


def test_other_models_and_arguments_are_errors_on_all_ranks(results: tuple[Found, Found]) -> None:
    found = of(results, "differing")
    last = len(found) - 1
    for one in found:
        for name, text in (
            ("weights", f"rank {last} holds another model than rank 0: 3.weight differs"),
            ("classes", f"rank {last} holds another model than rank 0: 1 (ReLU) differs"),
            ("width", f"rank {last} was given width=0.25, rank 0 width=0.5"),
            ("rule", f"rank {last} was given rule='centroid', rank 0 rule='restored'"),
            ("everywhere", "2.0"),
        ):
            kind, said = one[name]
            assert kind == "ValueError"
            assert text in said


def test_a_rank_that_raises_is_an_error_on_the_others(results: tuple[Found, Found]) -> None:
    *others, last = of(results, "differing")
    assert last["raises"] == ("OSError", "the disc is full")
    expected = "RankError", f"rank {len(others)} failed: OSError: the disc is full"
    assert [one["raises"] for one in others] == [expected] * len(others)


def test_where_one_rank_cannot_go_on_all_do_the_next_best(results: tuple[Found, Found]) -> None:
    found = of(results, "falling_back")
    assert {one["changes"] for one in found} == {found[0]["changes"]}
    assert "because dreaming failed (RuntimeError: no gradients here)" in found[0]["changes"][0]
    assert {one["small"] for one in found} == {found[0]["small"]}


def test_other_results_are_an_error_unless_the_hardware_differs(results: tuple[Found, Found]) -> None:
    found = of(results, "differing")
    for one in found:
        kind, text = one["not the same"]
        assert kind == "RuntimeError"
        assert "rank 1 made another model than rank 0 on the same hardware" in text
        assert one["other hardware"] == found[0]["first"]


def test_processes_train_as_one_does(results: tuple[Found, Found]) -> None:
    model, errors = plainly_trained()
    assert errors[-1] < errors[0]
    for one in of(results, "experiment"):
        assert one["stopped"][0] == "KeyError"
        assert one["errors"] == [98.0, 99.0, errors[-1]]
        for name, tensor in model.state_dict().items():
            assert torch.allclose(one["state"][name], tensor, rtol=1e-5, atol=1e-6)


def test_no_rank_waits_for_one_that_died_or_froze(results: tuple[Found, Found]) -> None:
    for end in results[1]:
        kind, text = end["error"]
        assert kind == "RankError"
        assert "a rank of the process group was lost" in text
        assert end["seconds"] < 10 * WAIT


def test_a_group_of_one_process_does_it_alone(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        options: dict[str, Any] = {"width": 0.5, "calibration": [drawn(8, 6, seed=1)]}
        for _ in range(2):  # its gloo groups are made once
            small = nac.compress(layers(), VECTOR, process_group=dist.group.WORLD, **options)
            assert bits(small) == bits(nac.compress(layers(), VECTOR, **options))
        with pytest.raises(ValueError, match=r"share 2\.0"):
            nac.plan(layers(), VECTOR, width=2.0, process_group=dist.group.WORLD)
        with joined(dist.group.WORLD, layers()) as ranks:
            assert list(ranks.share("abc", str.upper)) == ["A", "B", "C"]
            assert ranks.gathered(VECTOR)[0] is VECTOR
    finally:
        dist.destroy_process_group()
