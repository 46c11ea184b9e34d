"""What a device does at best, how much memory it took, and what a profile says that it did."""

import gzip
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nac_gpu.network.timing import synchronise


def reset_peak(device: torch.device) -> None:
    """Forget the largest memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Bytes allocated at most since then, points included; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def measure_rates(device: torch.device) -> dict[str, float]:
    """What the device does at best: bytes read and written by a large copy, and float64 operations of a product."""
    cuda = device.type == "cuda"
    source = torch.ones(2**27 if cuda else 2**24, dtype=torch.float64, device=device)  # 1 GiB, 128 MiB
    target = torch.empty_like(source)
    factor = torch.randn(4096 if cuda else 1024, 4096 if cuda else 1024, dtype=torch.float64, device=device)
    product = torch.empty_like(factor)

    def seconds(run: Callable[[], object]) -> float:
        taken = []
        for _ in range(8):
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:])  # the first warms up

    copied, multiplied = 2 * 8 * len(source), 2 * len(factor) ** 3
    return {
        "copy_bytes_per_second": copied / seconds(lambda: target.copy_(source)),
        "float64_product_flops": multiplied / seconds(lambda: torch.mm(factor, factor, out=product)),
    }


def trace(run: Callable[[], object], path: Path) -> None:
    """Profile one call on CUDA into a file for Chrome's or Perfetto's viewer; `.gz` is compressed.

    Args:
        run: what is called; once before, so that nothing is compiled in the profile.
        path: .json or .json.gz.
    """
    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(path))


def copies_to_host(path: Path) -> list[int | None]:
    """Bytes of every copy from the device to the host in a trace, in order; None where it does not say."""
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    content = json.loads(text)
    events = content.get("traceEvents", []) if isinstance(content, dict) else content
    copies = [event for event in events if event.get("name", "").startswith("Memcpy DtoH")]
    sizes = [event.get("args", {}).get("bytes") for event in sorted(copies, key=lambda event: event.get("ts", 0))]
    return [None if size is None else int(size) for size in sizes]
