"""Where the time of a linkage goes: each kernel, the launches, what the host hears of."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nac_gpu as nac
from common.device import copies_to_host, measure_rates
from common.runner import Check
from nac_gpu.kernels import Batch, Clusters, pad_points, products, squared_distances_batch, update_neighbours
from nac_gpu.network.timing import synchronise

_REPETITIONS = 7


def time_checks(device: torch.device, small: bool) -> Iterator[Check]:
    """The parts of a linkage at the sizes of VGG-16's layers, and whole linkages."""
    yield "what the device does at best", partial(measure_rates, device)
    shapes = [(60, 8)] if small else [(4096, 512), (512, 4609), (4096, 4097)]
    for n, d in shapes:
        points = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        yield f"parts {n}x{d}", partial(_parts, points, device)
        yield f"linkage {n}x{d}", partial(_linkage, [points], device)
        if device.type == "cuda":
            yield f"kernels {n}x{d}", partial(_profile, [points], device)


def _median(work: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Milliseconds of a call, by the host's clock, after one that warms up."""
    taken = []
    for _ in range(_REPETITIONS + 1):
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        taken.append((time.perf_counter() - start) * 1e3)
    taken = sorted(taken[1:])
    return {"median, ms": statistics.median(taken), "least": taken[0], "most": taken[-1]}


def _parts(points: Tensor, device: torch.device) -> dict[str, Any]:
    """Distances both ways, and the first search; says which way the library takes by itself."""
    n, d = points.shape
    flat, masses = (points - points.mean(0)).flatten().to(device), torch.ones(n, dtype=torch.float64, device=device)
    batch = Batch.of([(n, d)], device)
    found: dict[str, Any] = {"products by": products.products(flat)}
    found["padding"] = _median(lambda: pad_points(flat, batch), device)
    for way in ("tiles", "panels"):
        try:
            with products.use_products(way):
                found[f"distances by {way}"] = _median(lambda: squared_distances_batch(flat, masses, batch), device)
        except Exception as error:  # Triton before 3.5 has no float64 product
            found[f"distances by {way}"] = f"{type(error).__name__}: {error}".splitlines()[0]
    costs, clusters = squared_distances_batch(flat, masses, batch).view(n, n), Clusters.of_points(masses)
    found["first search"] = _median(lambda: update_neighbours(costs, clusters, every=True), device)
    return found


def _linkage(sets: list[Tensor], device: torch.device) -> dict[str, Any]:
    batch = [points.to(device) for points in sets]
    return _median(lambda: nac.ward_linkage(batch), device)


def _profile(sets: list[Tensor], device: torch.device) -> dict[str, Any]:
    """Of one call: how often each kernel ran and how long in all, and what was copied to the host."""
    batch = [points.to(device) for points in sets]
    nac.ward_linkage(batch)
    return profiled(lambda: nac.ward_linkage(batch))


def profiled(work: Callable[[], Any]) -> dict[str, Any]:
    """What the GPU does in a call: kernels by time, and the copies to the host with their bytes."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        copies = [size or 0 for size in copies_to_host(path)]
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    kernels = {
        event.key[:60]: {"times": event.count, "ms": round(event.self_device_time_total / 1e3, 4)} for event in events
    }
    return {
        "launches": sum(event.count for event in events),
        "busy, ms": sum(event.self_device_time_total for event in events) / 1e3,
        "copies to the host": len(copies),
        "bytes to the host": sum(copies),
        "largest copy": max(copies, default=0),
        "kernels": dict(list(kernels.items())[:25]),
    }
