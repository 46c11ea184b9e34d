"""Launch every kernel where there is no GPU: a stand-in for the driver compiles for one and notes what it is told.

    python tests/support/launch_standin.py

Prints a JSON line for each launch. Run in a process of its own, because a process that interprets kernels cannot
compile them.
"""

import json
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from nac_gpu.kernels import backend, products


class Utilities:
    """What a driver does with binaries."""

    def load_binary(self, name: str, *_: Any) -> tuple[str, str, int, int, int]:
        return f"module of {name}", f"function of {name}", 32, 0, 1024

    def unload_module(self, _: Any) -> None: ...

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class Launcher:
    """Notes a launch."""

    def __init__(self, *_: Any) -> None: ...

    def __call__(self, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        arguments = rest[4:]  # behind metadata and hooks
        LAUNCHES.append({"grid": [x, y, z], "function": function, "arguments": [noted(a) for a in arguments]})


def noted(argument: Any) -> Any:
    """An argument without its address."""
    if isinstance(argument, tuple):
        return [noted(each) for each in argument]
    return ["tensor", argument.data_ptr() % 16] if isinstance(argument, torch.Tensor) else argument


class Driver:
    """A GPU of the generation of the H100."""

    launcher_cls = Launcher
    utils = Utilities()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


LAUNCHES: list[dict[str, Any]] = []


def main() -> None:
    triton.runtime.driver.set_active(Driver())  # pyright: ignore
    asked = [0]
    run = triton.JITFunction.run

    def counted(*arguments: Any, **keywords: Any) -> Any:
        asked[0] += 1
        return run(*arguments, **keywords)

    triton.JITFunction.run = counted
    way = products._products_in_float64(torch.device("cpu"))
    print(json.dumps({"triton": triton.__version__, "products": way}), flush=True)
    for name, work in WORK.items():
        noted = []
        for again in range(3):
            LAUNCHES.clear()
            asked[0] = 0
            with backend.use_backend("triton"):
                work(again)
            noted.append({"asked": asked[0], "launches": list(LAUNCHES)})
        print(json.dumps({"work": name, "runs": noted}), flush=True)


def state(n: int = 70):
    from nac_gpu.kernels import Clusters

    return torch.rand(n, n, dtype=torch.float64), Clusters.of_points(torch.ones(n, dtype=torch.float64))


def distances(_: int) -> None:
    from nac_gpu.kernels import squared_distances

    squared_distances(torch.rand(70, 20, dtype=torch.float64), torch.ones(70, dtype=torch.float64))


def panels(_: int) -> None:
    with products.use_products("panels"):
        distances(0)
        search(0)


def search(_: int) -> None:
    from nac_gpu.kernels import nearest_centroids

    ones = torch.ones(70, dtype=torch.float64)
    nearest_centroids(torch.rand(70, 20, dtype=torch.float64), ones, torch.arange(70), torch.tensor([5]), 6)


def rounds(round_number: int) -> None:
    from nac_gpu.kernels import merge_centroids, merge_pairs, update_neighbours

    costs, clusters = state()
    clusters.rounds = round_number + 7
    update_neighbours(costs, clusters, every=True)
    merge_pairs(costs, clusters)
    merge_centroids(torch.rand(70, 20, dtype=torch.float64), clusters)


def packing(_: int) -> None:
    from nac_gpu.kernels import pack_costs, pack_slots

    costs, clusters = state()
    pack_slots(clusters, 30)
    pack_costs(costs, torch.arange(30))


def finishing(round_number: int) -> None:
    from nac_gpu.kernels import Batch, finish

    costs, clusters = state()
    clusters.rounds = round_number
    finish(costs.view(-1), clusters, Batch.of([(70, 0)], costs.device))


def seeding(_: int) -> None:
    from nac_gpu.kernels import seed_centres

    costs, clusters = state()
    seed_centres(costs, clusters.masses, torch.rand(4, 7, 3, dtype=torch.float64))


def a_view(start: int) -> None:
    """Points that begin at another place in memory: what was compiled for aligned ones does not do."""
    from nac_gpu.kernels import merge_centroids

    _, clusters = state()
    merge_centroids(torch.rand(71 * 20, dtype=torch.float64)[start % 2 :][: 70 * 20].view(70, 20), clusters)


def a_view_in_a_group(start: int) -> None:
    """The same for one tensor of a tuple."""
    from nac_gpu.kernels import merge_pairs

    costs, clusters = state(64)
    clusters.made_at = torch.zeros(65, dtype=torch.float64)[start % 2 :][:64]
    merge_pairs(costs, clusters)


WORK = {
    f.__name__: f for f in (distances, panels, search, rounds, packing, finishing, seeding, a_view, a_view_in_a_group)
}

if __name__ == "__main__":
    main()
