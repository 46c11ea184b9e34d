"""One step of gpu_check.sh or gpu_sanitise.sh. It needs torch, triton and numpy, and says what it lacks of the rest.

python experiments/gpu_steps.py smoke --output OUTPUT_FOLDER
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

import torch

from common.runner import Check, Runner


def _bench(arguments: argparse.Namespace, device: torch.device) -> int:
    """A preset of bench_linkage.py. SciPy takes long at thousands of dimensions: what was slow is not run again."""
    import bench_linkage
    from common.workloads import Preset

    options = bench_linkage.Options(
        preset=cast(Preset, "quick" if arguments.small else arguments.preset),
        providers=("scipy", "fastcluster", "sklearn", "nac_gpu", "floor"),
        device=cast(Literal["cpu", "cuda"], device.type),
        results=arguments.output / f"linkage_{device.type}.json",
        seconds=4.0 if arguments.preset == "large" else 2.0,
        peer_limit=4096,
        oracle_limit=2048 if arguments.preset == "large" else 4096,
        again=True,
    )
    return bench_linkage.main(options)


def _compress_time(arguments: argparse.Namespace, device: torch.device) -> int:
    """compress_time.py, one network at full width."""
    import compress_time

    options = compress_time.Options(
        device=device.type, networks=("vgg16",), multiplier=1.0, results=arguments.output / "compress_time.json"
    )
    if arguments.small:
        options = dataclasses.replace(options, networks=("resnet20",), multiplier=0.25, images=16, refine=1, steps=1)
    compress_time.main(options)
    return 0


def _checks(step: str, device: torch.device, small: bool) -> list[Check]:
    if step == "times":
        from common.gpu_times import time_checks

        return list(time_checks(device, small))
    if step in ("compress", "default"):
        from common.gpu_compress import compress_checks, default_checks

        return list((compress_checks if step == "compress" else default_checks)(device, small))
    from common.gpu_smoke import kernel_checks, linkage_checks

    kernels = list(kernel_checks(device, small or step == "kernels"))
    return kernels if step == "kernels" else [*kernels, *linkage_checks(device, small)]


_OTHERS: dict[str, Callable[[argparse.Namespace, torch.device], int]] = {
    "bench": _bench,
    "compress_time": _compress_time,
}


def main() -> int:
    """Run the step; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["smoke", "kernels", "times", "compress", "default", *_OTHERS])
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--preset", default="neurons", help="of bench_linkage.py")
    parser.add_argument("--small", action="store_true", help="at sizes that an interpreter of kernels can do")
    parser.add_argument("--first", type=int, default=0, help="the check to begin with")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is false")
        return 1
    if arguments.step in _OTHERS:
        return _OTHERS[arguments.step](arguments, device)
    path = arguments.output / "gpu_check.json"
    runner = Runner(arguments.step, device, path, arguments.first, limit=60.0 if arguments.step != "default" else 100.0)
    return runner.run(_checks(arguments.step, device, arguments.small))


if __name__ == "__main__":
    sys.exit(main())
