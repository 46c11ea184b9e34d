"""Merging together with other methods: 8-bit quantisation and magnitude pruning, as ONNX files run by onnxruntime.

    python experiments/combined.py --data PATH                              # VGG-16 of a quarter of the width, CIFAR-10
    python experiments/combined.py --dataset digits --epochs 4              # a few minutes, needs no data

A trained network and what is left of it after merging (a share of the parameters, fine-tuned if asked): each as it is,
with weights and activations in 8 bits (ranges from unlabelled training images), with half of its weights at zero, and
both. Zeros make no dense network faster; what they save on disk shows when the file is packed.
"""

import copy
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn.utils import prune

import nac_gpu as nac
from common.data import DatasetName, load, normalise, statistics
from common.models import Network
from common.results import Measured, Results, mean_sd
from common.training import Precision
from common.vgg import Run, Training
from nac_gpu.network.timing import Spread, spread
from nac_gpu.reporting.text import table


@dataclass
class Options:
    """Train a network, merge it, combine with quantisation and pruning, print and keep the table."""

    dataset: DatasetName = "cifar10"
    """What to learn; `folder` is any tree train/<class>/*.png, test/<class>/*.png of small square images."""
    data: Path = Path("data")
    """Where the data set is, or is downloaded to."""
    download: bool = False
    """Let torchvision fetch the data set."""
    network: Network = "vgg16"
    """As in vgg_cifar.py."""
    multiplier: float = 0.25
    """Width multiplier of every layer."""
    epochs: int = 16
    """Training epochs."""
    share: float = 0.25
    """Parameters that merging keeps."""
    finetune_epochs: int = 0
    """Epochs of fine-tuning behind merging; 0: none."""
    zeros: float = 0.5
    """Share of the weights that pruning sets to zero, the smallest of each layer."""
    images: int = 512
    """Unlabelled training images, to merge and to quantise with."""
    seconds: float = 10.0
    """How long to time, in all, at each batch size."""
    seeds: tuple[int, ...] = (0,)
    """One whole run each."""
    output: Path = Path("runs/combined")
    """Checkpoints and ONNX files."""
    results: Path | None = None
    """The JSON file; by default in --output."""


_FEWEST = 6  # rounds at a batch size, the first for warming up
BATCHES = (1, 64)
STAGES = ("", ", 8 bits", ", pruned", ", pruned, 8 bits")


def pruned(model: nn.Module, zeros: float) -> nn.Module:
    """Set the smallest weights of every linear layer and convolution to zero, in place (Han et al. 2015)."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            prune.l1_unstructured(module, "weight", zeros)
            prune.remove(module, "weight")
    return model


class _Batches:
    """Calibration batches as onnxruntime's quantiser asks for them."""

    def __init__(self, name: str, batches: list[Tensor]) -> None:
        self._rest: Iterator[dict[str, np.ndarray]] = iter([{name: batch.numpy()} for batch in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, or None."""
        return next(self._rest, None)


def session(path: Path) -> Any:
    """What runs an ONNX file on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def quantise(path: Path, target: Path, batches: list[Tensor]) -> None:
    """Write an ONNX file with weights (by channel) and activations in 8 bits, their ranges from batches of inputs."""
    from onnxruntime.quantization import QuantFormat, QuantType, quant_pre_process, quantize_static

    prepared = target.with_suffix(".prepared.onnx")
    name = session(path).get_inputs()[0].name
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(target),
        cast(Any, _Batches(name, batches)),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    prepared.unlink()


def run(found: Any, inputs: Tensor) -> np.ndarray:
    """Outputs of a session."""
    return found.run(None, {found.get_inputs()[0].name: inputs.numpy()})[0]


@dataclass
class Combination:
    """One seed: the networks, and their files."""

    options: Options
    run: Run
    folder: Path

    def __post_init__(self) -> None:
        """Train, and make the two networks."""
        run, options = self.run, self.options
        model = run.baseline().float()
        self.model = model.to("cpu", memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        self.example = torch.zeros(1, *run.train.pixels.shape[1:])
        self.images = cast(list[Tensor], run.calibration())
        mean, std = statistics(run.train)
        self.test = normalise(run.test.pixels, mean, std)
        self.merged = nac.compress(self.model, self.example, params=options.share, calibration=self.images)
        if options.finetune_epochs:
            run.finetune(self.merged, self.model, "merged")
        self.folder.mkdir(parents=True, exist_ok=True)

    def network(self, name: str, stage: str) -> nn.Module:
        """The original or the merged network, pruned if the stage says so."""
        found = copy.deepcopy({"original": self.model, "merged": self.merged}[name])
        if "pruned" in stage:
            pruned(found, self.options.zeros)
        return found.float().eval()

    def file(self, name: str, stage: str) -> Path:
        """The ONNX file of a stage, which is written unless it is there."""
        path = self.folder / f"{name}{stage.replace(', ', '-').replace(' ', '')}.onnx"
        if not path.exists():
            if stage.endswith("8 bits"):
                quantise(self.file(name, stage.removesuffix(", 8 bits")), path, self.images)
            else:
                nac.export(self.network(name, stage), path, self.example)
        return path

    def measure(self, name: str, stage: str) -> Measured:
        """Parameters, bytes of the file and of the packed file, the test error, and seconds of a pass."""
        path = self.file(name, stage)
        content = path.read_bytes()
        found = session(path)
        wrong = sum(
            int((run(found, inputs).argmax(1) != labels.numpy()).sum())
            for inputs, labels in zip(self.test.split(500), self.run.test.labels.split(500), strict=True)
        )
        return {
            "parameters": nac.cost(self.network(name, stage), self.example).parameters,
            "bytes": len(content),
            "packed": len(zlib.compress(content, 9)),
            "error": 100 * wrong / len(self.test),
            **{f"batch {size}": seconds[name + stage].median for size, seconds in self.seconds.items()},
            **{f"batch {size}, spread": asdict(seconds[name + stage]) for size, seconds in self.seconds.items()},
        }

    @cached_property
    def seconds(self) -> dict[int, dict[str, Spread]]:
        """Seconds of a pass of every file, timed in turn, by the batch size."""
        return {size: self._seconds(size) for size in BATCHES}

    def _seconds(self, batch: int) -> dict[str, Spread]:
        inputs = self.test[:batch]
        sessions = {n + s: session(self.file(n, s)) for n in ("original", "merged") for s in STAGES}
        taken: dict[str, list[float]] = {name: [] for name in sessions}
        rounds, stop = 0, time.perf_counter() + self.options.seconds
        while rounds < _FEWEST or time.perf_counter() < stop:
            for name, found in sessions.items():
                start = time.perf_counter()
                run(found, inputs)
                taken[name].append(time.perf_counter() - start)
            rounds += 1
        return {name: spread(np.array(seconds[1:])) for name, seconds in taken.items()}  # the first is for warming up


def show(results: Results) -> str:
    """The table: a row a file."""
    rows = []
    for name in results.rows():
        row = next(iter(results.seeds.values()))["rows"][name]
        milliseconds = [f"{1000 * row[f'batch {size}']:.3g}" for size in BATCHES]
        sizes = [f"{row[column] / 1e6:.3g}" for column in ("bytes", "packed")]
        error = mean_sd(results.values(name, "error"))
        rows.append([name, f"{row['parameters'] / 1e6:.3g} M", *sizes, error, *milliseconds])
    batches = [f"batch {size}, ms" for size in BATCHES]
    return table(["file", "parameters", "MB", "packed, MB", "error %", *batches], rows)


def main(options: Options) -> None:
    """Run every seed, print the table, write the JSON."""
    precision = Precision.best("cpu")
    train, test = load(options.dataset, options.data, options.download)
    trained = Training(
        dataset=options.dataset,
        network=options.network,
        multiplier=options.multiplier,
        epochs=options.epochs,
        finetune_epochs=options.finetune_epochs,
        images=options.images,
        output=options.output,
    )
    path = options.results or options.output / f"combined-{options.network}-x{options.multiplier:g}.json"
    configuration = {
        name: getattr(options, name)
        for name in ("dataset", "network", "multiplier", "share", "finetune_epochs", "zeros", "images", "seconds")
    }
    configuration["training"] = asdict(trained.recipe)
    results = Results(path, configuration, precision.device)
    names = [name + stage for name in ("original", "merged") for stage in STAGES]
    for seed in options.seeds:
        if set(names) <= set(results.seeds.get(str(seed), {}).get("rows", ())):
            continue
        run = Run(trained, seed, train, test, precision)
        made = Combination(options, run, options.output / f"seed{seed}")
        for name in ("original", "merged"):
            for stage in STAGES:
                results.measure(name + stage, seed, partial(made.measure, name, stage))
    print(f"\n{show(results)}\n\nwritten: {path}")


if __name__ == "__main__":
    main(cast(Options, tyro.cli(Options, description=__doc__)))
