"""The machine that measurements were made on."""

import platform
from datetime import datetime, timezone
from pathlib import Path

import torch

import nac_gpu


def environment(device: torch.device) -> dict[str, str | int]:
    """Hardware and versions that a measurement depends on; nothing that names the machine.

    Args:
        device: where the arithmetic was done.
    """
    found: dict[str, str | int] = {"processor": _processor(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found | {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "nac_gpu": nac_gpu.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _processor() -> str:
    """The CPU's name as its maker gives it, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
