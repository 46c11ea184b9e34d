"""A mixture of experts with fewer experts: perplexity after merging, beside methods of others.

    python experiments/mixtures.py --folder FOLDER --train valid.txt test.txt --test test.txt more.txt --minutes 25

First a small network of Mixtral's kind (8 experts in each layer, 2 of them for a token) is trained on the texts. Of a
text that is both in --train and in --test, the first part trains and the last one tests. FOLDER holds the tokenizer and
a checkpoint, and a training that was stopped goes on from there.

Then every method leaves 6 and 4 of the experts, and all get the same calibration tokens: windows of the training texts,
at even distances. No method sees labels. The methods of others are our reading of their papers
(`common/mixture_peers.py`). `nac_gpu.merge_experts` trains the experts to reproduce the original's outputs; "not
refined" is without that, and "REAP, refined", say, is what REAP leaves, after the same training of experts and routers.
Perplexity is that of windows that do not overlap. Measurements are kept after each method and size, and a run that was
stopped goes on where it was.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import tyro
from torch import Tensor, nn

import nac_gpu as nac
from common.language_blocks import parameters
from common.language_data import Batch, perplexity, spread, windows
from common.mixture_peers import PEERS, mixtures, reduced
from common.mixture_training import Shape, Training, encoded, made_tokenizer, split, trained
from common.results import Results
from common.zoo_measure import memory
from nac_gpu.calibration.batches import divided
from nac_gpu.merging.refinement import PASSES, Amount, learn
from nac_gpu.reporting.text import table

Measured = dict[str, Any]
NAC, UNREFINED, DREAMS = "nac", "nac, not refined", "nac, no data"
REFINED = ", refined"
METHODS = (NAC, UNREFINED, DREAMS, *PEERS, *(f"{name}{REFINED}" for name in PEERS))
DEFAULT = (UNREFINED, *PEERS, NAC, DREAMS, f"REAP{REFINED}", f"REAM, pairs{REFINED}")


@dataclass
class Options:
    """Train a mixture of experts, leave fewer experts by every method, print and keep the table."""

    folder: Path
    """Folder of the tokenizer and the checkpoint."""
    train: tuple[Path, ...]
    """Texts to train on, and to calibrate with."""
    test: tuple[Path, ...]
    """Texts to measure on."""
    minutes: float = 25
    """Of training."""
    held_out: float = 0.2
    """Share of a text in --train that tests, if the text is in --test, too."""
    tokens: int = 65536
    """Calibration tokens."""
    windows: int = 0
    """Windows of each test text, at even distances; 0 for all."""
    experts: tuple[int, ...] = (6, 4)
    """How many experts are left in each layer."""
    methods: tuple[str, ...] = DEFAULT
    """Names of methods, as in the table, in the order in which they run."""
    shape: Shape = field(default_factory=Shape)
    """Sizes of the network."""
    seed: int = 0
    """Of the training, of the random choice of experts and of refinement."""
    output: Path = Path(__file__).parent / "results" / "mixtures.json"
    """The JSON file."""


@dataclass
class Subject:
    """A mixture of experts, what it is calibrated with, and how it is measured.

    Attributes:
        model: the original, which stays as it is.
        batches: the calibration inputs.
        texts: windows of the test texts, by their names.
        seed: of random choices.
    """

    model: nn.Module
    batches: list[Batch]
    texts: dict[str, Tensor]
    seed: int = 0

    def compressed(self, method: str, count: int) -> nn.Module:
        """The model with so many experts in each layer."""
        if method not in (NAC, UNREFINED, DREAMS):
            small = reduced(self.model, PEERS[method.removesuffix(REFINED)], count, self.batches, self.seed)
            if method.endswith(REFINED):
                self.refine(small)
            return small
        passes, calibration = PASSES if method != UNREFINED else 0, "dream" if method == DREAMS else self.batches
        example = {name: value[:1] for name, value in self.batches[0].items()}
        return nac.merge_experts(
            self.model, example, count, calibration=calibration, refine=passes, seed=self.seed
        ).eval()

    def refine(self, small: nn.Module) -> None:
        """Train experts and routers as `nac_gpu.merge_experts` does, in place."""
        inside = {f"{name}." for name, module in small.named_modules() if module in mixtures(small)}
        touched = [name for name, _ in small.named_parameters() if name.startswith(tuple(inside))]
        told = learn(small, self.model, touched, divided(self.batches), Amount(PASSES), seed=self.seed)
        print(told, flush=True)

    def measured(self, method: str, count: int) -> Measured:
        """Leave fewer experts by a method, and measure the result."""
        start = time.perf_counter()
        small = self.compressed(method, count)
        found = self.told(small, {"seconds": round(time.perf_counter() - start, 1), "memory": memory()})
        print(f"{row(method, count)}: {found}", flush=True)
        return found

    def told(self, model: nn.Module, more: Measured) -> Measured:
        """The size of a model, and its perplexity on every text."""
        return {
            "parameters": parameters(model),
            "kept": parameters(model) / parameters(self.model),
            **{name: perplexity(model, found, rows=8) for name, found in self.texts.items()},
            **more,
        }


def row(method: str, count: int) -> str:
    """The name of a row."""
    return f"{method} @ {count}"


def made(options: Options) -> tuple[Subject, Measured]:
    """The trained network, and what is known of it and of the texts."""
    both = {path.resolve() for path in options.train} & {path.resolve() for path in options.test}

    def part(path: Path, number: int) -> str:
        text = path.read_text(encoding="utf-8")
        return split(text, options.held_out)[number] if path.resolve() in both else text

    texts = [part(path, 0) for path in options.train]
    tokenizer = made_tokenizer(texts, options.shape.vocabulary, options.folder / "tokenizer")
    tokens = [encoded(tokenizer, text) for text in texts]
    training = Training(options.minutes, seed=options.seed)
    used = {path.name: len(found) for path, found in zip(options.train, tokens, strict=True)}
    print(f"tokens to train on: {used}", flush=True)
    model, told = trained(options.shape, training, torch.cat(tokens), options.folder)
    cut = training.length
    calibration = spread(windows(torch.cat(tokens), cut), max(1, options.tokens // cut))
    tests = {path: encoded(tokenizer, part(path, 1)) for path in options.test}
    found = {path.stem: spread(windows(text, cut), options.windows) for path, text in tests.items()}
    batches = [{"input_ids": rows} for rows in calibration.split(training.rows)]
    about = {
        "shape": asdict(options.shape),
        "training": asdict(training) | told,
        "trained on": used,
        "calibration tokens": calibration.numel(),
        "tested on": {name: text.numel() for name, text in found.items()},
    }
    return Subject(model, batches, found, options.seed), about


def show(results: Results, names: Sequence[str], texts: Sequence[str]) -> str:
    """The table: a row a method and size."""
    found = {name: values for entry in results.seeds.values() for name, values in entry["rows"].items()}
    cells = []
    for name in names:
        if name in found:
            values = found[name]
            numbers = [f"{values[text]:.4g}" if values[text] < 1e4 else f"{values[text]:.1e}" for text in texts]
            seconds = f"{values['seconds']:.0f}" if "seconds" in values else "-"
            cells.append([name, f"{values['parameters']:,}", f"{100 * values['kept']:.1f}", *numbers, seconds])
    return table(["method @ experts", "parameters", "kept, %", *texts, "seconds"], cells)


def main(options: Options) -> None:
    """Train, run every method at every size, print the table, write the JSON.

    Raises:
        SystemExit: a method that does not exist.
    """
    for name in options.methods:
        if name not in METHODS:
            raise SystemExit(f"--methods {name!r}, expected some of: {'; '.join(METHODS)}")
    subject, about = made(options)
    print(f"{parameters(subject.model):,} parameters; {about}", flush=True)
    configuration = about | {"arithmetic": "float32", "transformers": version("transformers")}
    results = Results(options.output, configuration, torch.device("cpu"))
    original = results.measure("original", options.seed, lambda: subject.told(subject.model, {}))
    print(f"original: {original}", flush=True)
    rows = [(method, count) for method in options.methods for count in options.experts]
    for method, count in rows:
        results.measure(row(method, count), options.seed, partial(subject.measured, method, count))
    print(f"\n{show(results, ['original', *(row(*each) for each in rows)], list(subject.texts))}\n")
    print(f"written: {results.path}")


if __name__ == "__main__":
    main(cast(Options, tyro.cli(Options, description=__doc__)))
