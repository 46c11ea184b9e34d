"""A trained network of any kind, compressed in several ways without fine-tuning, judged on inputs that were kept aside.

    python experiments/any_model.py MODULE:FUNCTION --inputs inputs.npy --test test.npy

Every way removes the same share of the parameters. "Least contribution" are the neurons whose activations, times the
weights that read them, do least for what the next layers put out; consumers are refitted by the same regressions. The
inputs without data are the library's own (`calibration="dream"`).

Of the answers to the test inputs, the share is told whose largest entry of the last output is where the original's is,
their mean cosine with the original's, and the squared error of all outputs relative to their variance.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import tyro
from torch import Tensor, nn

import nac_gpu as nac
from common.results import Results
from common.zoo_measure import memory
from nac_gpu.cli.inputs import read_tensors
from nac_gpu.cli.models import find
from nac_gpu.network.comparing import change
from nac_gpu.network.judging import Answers, all_answers
from nac_gpu.reporting.text import count, table

Measured = dict[str, Any]
_BATCH = 64


def removed_at_random(points: Tensor, k: int, *, weights: Tensor | None = None, seed: int = 0) -> Tensor:
    """Labels that keep k neurons, drawn at random, and remove the others."""
    kept = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:k].sort().values
    labels = torch.full((len(points),), -1, dtype=torch.int64)
    labels[kept] = torch.arange(k)
    return labels


#: Ways to compress -> arguments of `nac_gpu.compress`.
_CHOICES: dict[str, Measured] = {
    "default": {},
    "default, not refined": {"refine": 0},
    "least contribution removed, refitted": {"method": "removal", "refine": 0},
    "least contribution removed": {"method": "removal", "rule": "restored", "neurons": "activations"},
    "random ones removed, refitted": {"method": removed_at_random, "refine": 0},
}
INPUTS, DREAMS, WEIGHTS = "inputs", "without data", "weights only"
WAYS: dict[str, Measured] = {
    **{f"{INPUTS}: {name}": more for name, more in _CHOICES.items()},
    **{f"{DREAMS}: {name}": {"calibration": "dream", **more} for name, more in _CHOICES.items()},
    f"{WEIGHTS}: default": {"calibration": "none"},
    f"{WEIGHTS}: random ones removed": {"calibration": "none", "method": removed_at_random},
}


@dataclass
class Options:
    """Compress a network in several ways, print and keep the table."""

    model: tyro.conf.Positional[str]
    """As for `nac compress`: torchvision:NAME, timm:NAME, or MODULE:FUNCTION; with its trained weights."""
    inputs: Path
    """Inputs to calibrate with: a file with one tensor (.npy, .safetensors, .pt)."""
    test: Path
    """Inputs to judge on."""
    params: tuple[float, ...] = (0.75, 0.5)
    """Shares of the parameters that are kept."""
    images: int = 256
    """How many of the inputs are used, at most: the first ones."""
    ways: tuple[str, ...] | None = None
    """Names of ways, as in the table."""
    seed: int = 0
    """Of what is drawn."""
    output: Path | None = None
    """The JSON file; by default experiments/results/any_model_FUNCTION.json."""


class Subject:
    """A network, its inputs, and what it answers.

    Args:
        options: of the command line.
    """

    def __init__(self, options: Options) -> None:
        torch.manual_seed(options.seed)
        self.model = find(options.model, pretrained=options.model.startswith(("torchvision:", "timm:"))).build().eval()
        inputs, test = (_one(path) for path in (options.inputs, options.test))
        self.inputs, self.test = list(inputs[: options.images].split(_BATCH)), list(test.split(_BATCH))
        self.seed = options.seed
        self._expected = all_answers(self.model, self.test)

    def measured(self, way: str, share: float) -> Measured:
        """The network that a way makes, and how it answers."""
        more: Mapping[str, Any] = {"calibration": self.inputs, **WAYS[way]}
        start = time.perf_counter()
        small = nac.compress(self.model, self.inputs[0][:1], params=share, seed=self.seed, **more)
        seconds = {"seconds": round(time.perf_counter() - start, 1), "memory": memory()}
        return self.told(small) | seconds

    def told(self, network: nn.Module) -> Measured:
        """How large a network is, and how near its answers are to the original's."""
        parameters = sum(parameter.numel() for parameter in network.parameters())
        found, expected = (_joined(answers) for answers in (all_answers(network, self.test), self._expected))
        now, then = (values[-1].flatten(1) for values in (found, expected))
        return {
            "parameters": parameters,
            "agreement": float((now.argmax(1) == then.argmax(1)).double().mean()),
            "cosine": float(torch.cosine_similarity(now.double(), then.double()).mean()),
            "error": float(cast(Tensor, change(found, expected))),
        }


def _one(path: Path) -> Tensor:
    values = read_tensors(path)
    if len(values) != 1:
        raise SystemExit(f"{path}: expected one tensor, found {len(values)}")
    return values[0]


def _joined(answers: list[Answers]) -> tuple[Tensor, ...]:
    """The answers to all batches, output by output."""
    return tuple(torch.cat(parts) for parts in zip(*(one.values for one in answers), strict=True))


def row(way: str, share: float) -> str:
    """The name of a row."""
    return f"{way} @ {share:g}"


def show(rows: Mapping[str, Measured]) -> str:
    """The table."""
    cells = [
        [
            name,
            count(values["parameters"]),
            f"{100 * values['agreement']:.2f}",
            f"{values['cosine']:.4f}",
            f"{values['error']:.4f}",
            f"{values.get('seconds', 0):.0f}",
        ]
        for name, values in rows.items()
    ]
    return table(["way @ kept", "parameters", "agreement, %", "cosine", "error", "seconds"], cells)


def main(options: Options) -> None:
    """Compress in every way to every size, print the table, write the JSON."""
    ways = tuple(WAYS) if options.ways is None else options.ways
    for way in ways:
        if way not in WAYS:
            raise SystemExit(f"--ways {way!r}, expected some of: {'; '.join(WAYS)}")
    subject, name = Subject(options), options.model.rpartition(":")[2]
    configuration = {"model": name, "inputs": sum(map(len, subject.inputs)), "test": sum(map(len, subject.test))}
    path = options.output or Path(__file__).parent / "results" / f"any_model_{name}.json"
    results = Results(path, configuration, torch.device("cpu"))
    rows: dict[str, Callable[[], Measured]] = {"original": partial(subject.told, subject.model)}
    rows |= {row(way, share): partial(subject.measured, way, share) for share in options.params for way in ways}
    found: dict[str, Measured] = {}
    for title, make in rows.items():
        found[title] = results.measure(title, options.seed, make)
        print(f"{title}: {found[title]}", flush=True)
    print(f"\n{show(found)}\n\nwritten: {results.path}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
