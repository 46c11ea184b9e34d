"""The hardware and software versions that results depend on."""

import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

from nac_gpu.network.running import device_of


def environment(device: torch.device) -> dict[str, str | int]:
    """Hardware and versions that a measurement depends on; nothing that identifies the machine.

    Args:
        device: on which the measurement ran.
    """
    found: dict[str, str | int] = {"processor": _processor(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found | {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "nac_gpu": package_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def package_version() -> str:
    """The installed version of nac_gpu; "unknown" if its files are used without installation."""
    try:
        return version("nac-gpu")
    except PackageNotFoundError:
        return "unknown"


def _processor() -> str:
    """The CPU's model name where the system reports it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def hardware(model: nn.Module) -> str:
    """Everything that the rounding of a result depends on: processor, number of threads, version of PyTorch."""
    device = device_of(model)
    name = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}"
