"""Transformers with fewer parameters: perplexity, or agreement of sentence embeddings, beside methods of others.

    python experiments/language.py --model FOLDER --calibration valid.txt --test test.txt more.txt
    python experiments/language.py --model FOLDER --calibration valid.txt --test test.txt --task embeddings

FOLDER holds a model and its tokenizer as `transformers` writes them: a Llama-like causal language model, or a BERT-like
encoder of sentences (mean pooling). Every method removes the same share of all parameters of the model, tied ones
counted once, without any training of its own by labels, and all get the same calibration tokens. The methods of others
are our reading of their papers (`common/language_peers.py`, `common/language_slicing.py`). Biases and matrices that a
method adds are counted. Perplexity is that of windows that do not overlap, in float32; no token marks their beginning.

Seconds are those of the compression, with the pass over the calibration tokens that some methods share counted for
each. The memory's peak is that of the process so far: for that of one method, run it alone (--methods). Measurements
are kept after each method and size, and a run that was stopped goes on where it was.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
import tyro
from torch import nn

import nac_gpu as nac
from common.language_blocks import groups_of, parameters
from common.language_data import (
    Batch,
    agreement,
    count_tokens,
    embeddings,
    perplexity,
    sentence_batches,
    sentences_of,
    spread,
    tokens_of,
    windows,
)
from common.language_peers import (
    RIDGE,
    Pruning,
    best_layers,
    layers_to_keep,
    least_changing_dropped,
    pruned,
    with_layers,
)
from common.language_slicing import sliced
from common.language_statistics import Observed, observe
from common.results import Results
from common.zoo_measure import memory
from nac_gpu.reporting.text import table

Task = Literal["perplexity", "embeddings"]
Measured = dict[str, Any]
_ROWS = 8  # windows in a batch of calibration
_TRIED_ON = 256  # sentences, on which choices of layers are compared

PRUNING = {
    "FLAP": Pruning("fluctuation", adaptive=True, repair="means"),
    "FLAP + ridge": Pruning("fluctuation", adaptive=True, repair="ridge"),
    "FLAP, MLPs only": Pruning("fluctuation", adaptive=True, heads=False, repair="means"),
    "FLAP, MLPs only + ridge": Pruning("fluctuation", adaptive=True, heads=False, repair="ridge"),
    "Wanda": Pruning("activation"),
    "Wanda + ridge": Pruning("activation", repair="ridge"),
    "Wanda, MLPs only": Pruning("activation", heads=False),
    "Wanda, MLPs only + ridge": Pruning("activation", heads=False, repair="ridge"),
    "magnitude": Pruning("magnitude"),
    "random": Pruning("random"),
}
NAC = {"nac": False, "nac no data": True}
#: Whether the table of embeddings stays one with the head's.
SLICING = {"SliceGPT": False, "SliceGPT, tied": True}
DROPPED, LAST, BEST = "layers dropped", "last layers dropped", "best layers kept"
METHODS: dict[Task, tuple[str, ...]] = {
    "perplexity": (*NAC, *SLICING, *PRUNING, DROPPED),
    "embeddings": (*NAC, *PRUNING, DROPPED, LAST, BEST),
}
DEFAULT: dict[Task, tuple[str, ...]] = {
    "perplexity": METHODS["perplexity"],
    "embeddings": (*NAC, "Wanda", "Wanda + ridge", "magnitude", "random", LAST, BEST),
}
REMOVED: dict[Task, tuple[float, ...]] = {"perplexity": (0.1, 0.2, 0.3), "embeddings": (0.25,)}


@dataclass
class Options:
    """Compress a transformer by every method to every size, print and keep the table."""

    model: Path
    """Folder of the model and its tokenizer."""
    calibration: Path
    """A text to calibrate with."""
    test: tuple[Path, ...]
    """Texts to measure on."""
    task: Task = "perplexity"
    """Which measure."""
    tokens: int = 65536
    """Calibration tokens: the first ones of the text, or of its sentences."""
    length: int = 512
    """Tokens of a window; a sentence is cut off there, too."""
    windows: tuple[int, ...] = ()
    """For perplexity: how many windows of each test text, at even distances; one number for all, 0 for the whole."""
    sentences: int = 1000
    """For embeddings: how many sentences of each test text, at even distances."""
    removed: tuple[float, ...] | None = None
    """Shares of all parameters that are removed; by default 0.1 0.2 0.3, and 0.25 for embeddings."""
    methods: tuple[str, ...] | None = None
    """Names of methods, as in the table, in the order in which they run."""
    seed: int = 0
    """Of the random choice of neurons."""
    output: Path | None = None
    """The JSON file; by default experiments/results/language_TASK_MODEL.json."""


def chosen_methods(options: Options) -> tuple[str, ...]:
    """The methods to be compared.

    Raises:
        SystemExit: a method that does not exist for the task.
    """
    known = METHODS[options.task]
    for name in options.methods or ():
        if name not in known:
            raise SystemExit(f"--methods {name!r}, expected some of: {'; '.join(known)}")
    return DEFAULT[options.task] if options.methods is None else options.methods


@dataclass
class Subject:
    """A model, what it is calibrated with, and how it is measured.

    Attributes:
        model: the original, which stays as it is.
        batches: the calibration inputs.
        quality: measures of a model.
        closeness: how close a model is to the original on some calibration inputs; only for embeddings.
        seed: of random choices.
        observing: seconds that `observed` took.
    """

    model: nn.Module
    batches: list[Batch]
    quality: Callable[[nn.Module], Measured]
    closeness: Callable[[nn.Module], float] | None = None
    seed: int = 0
    observing: float = 0.0

    @cached_property
    def observed(self) -> Observed:
        """What the calibration inputs show of the model."""
        start = time.perf_counter()
        found = observe(self.model, self.batches, [group.reader for group in groups_of(self.model)])
        self.observing = time.perf_counter() - start
        return found

    def compressed(self, method: str, removed: float) -> nn.Module:
        """The smaller model that a method makes."""
        most = (1 - removed) * parameters(self.model)
        if method in NAC:
            example = {name: value[:1] for name, value in self.batches[0].items()}
            calibration = "dream" if NAC[method] else self.batches
            return nac.compress(self.model, example, params=1 - removed, calibration=calibration)
        if method in SLICING:
            return sliced(self.model, most, self.batches, tied=SLICING[method])
        if method in PRUNING:
            rule = PRUNING[method]
            return pruned(self.model, rule, most, self.batches, self.observed if rule.observes else None, self.seed)
        if method == DROPPED:
            return least_changing_dropped(self.model, layers_to_keep(self.model, most, math.floor), self.observed)
        count = layers_to_keep(self.model, most, round)
        if method == LAST:
            return with_layers(self.model, range(count))
        assert self.closeness is not None, "only embeddings have this method"
        return best_layers(self.model, count, self.closeness)

    def measured(self, method: str, removed: float) -> Measured:
        """Compress by a method, and measure the result."""
        shares = method == DROPPED or (method in PRUNING and PRUNING[method].observes)
        if shares:
            _ = self.observed  # once, and counted for all that use it
        start = time.perf_counter()
        small = self.compressed(method, removed)
        seconds = time.perf_counter() - start + (self.observing if shares else 0)
        found = self.told(small, {"seconds": round(seconds, 1), "memory": memory()})
        print(f"{row(method, removed)}: {found}", flush=True)
        return found

    def told(self, model: nn.Module, more: Measured) -> Measured:
        """The size of a model, and how good it is."""
        count, start = parameters(model), time.perf_counter()
        found = {"parameters": count, "kept": count / parameters(self.model), **self.quality(model.eval())}
        return found | more | {"seconds of evaluation": round(time.perf_counter() - start, 1)}


def loaded(options: Options) -> tuple[Any, nn.Module]:
    """The tokenizer, and the model in float32."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    kind: Any = AutoModelForCausalLM if options.task == "perplexity" else AutoModel
    return AutoTokenizer.from_pretrained(options.model), kind.from_pretrained(options.model, dtype=torch.float32).eval()


def perplexities(texts: dict[str, torch.Tensor], model: nn.Module) -> Measured:
    """The perplexity of every text."""
    return {name: perplexity(model, found) for name, found in texts.items()}


def agreements(texts: dict[str, tuple[list[Batch], torch.Tensor]], model: nn.Module) -> Measured:
    """How well the embeddings of every text's sentences agree with the original's."""
    found = {name: agreement(before, embeddings(model, batches)) for name, (batches, before) in texts.items()}
    return {f"{measure}, {name}": value for name, values in found.items() for measure, value in values.items()}


def language_model(options: Options) -> tuple[Subject, Measured]:
    """A model that is measured by its perplexity, and what is known of the texts."""
    tokenizer, model = loaded(options)
    calibration = windows(tokens_of(tokenizer, options.calibration)[: options.tokens], options.length)
    limits = options.windows * len(options.test) if len(options.windows) == 1 else options.windows
    limits = limits or (0,) * len(options.test)
    texts, told = {}, {options.calibration.name: calibration.numel()}
    for path, limit in zip(options.test, limits, strict=True):
        whole = windows(tokens_of(tokenizer, path), options.length)
        texts[path.stem] = spread(whole, limit)
        told[path.name] = texts[path.stem].numel()
        print(f"{path.name}: {len(texts[path.stem])} of {len(whole)} windows, {told[path.name]:,} tokens")
    batches = [{"input_ids": part} for part in calibration.split(_ROWS)]
    return Subject(model, batches, partial(perplexities, texts), seed=options.seed), {"tokens used": told}


def sentence_encoder(options: Options) -> tuple[Subject, Measured]:
    """A model that is measured by its embeddings of sentences, and what is known of the texts."""
    tokenizer, model = loaded(options)

    def batches_of(sentences: Sequence[str]) -> list[Batch]:
        return sentence_batches(tokenizer, sentences, options.length)

    texts, told = {}, {}
    for path in options.test:
        whole = sentences_of(path)
        batches = batches_of(spread(whole, options.sentences))
        texts[path.stem] = batches, embeddings(model, batches)
        told[path.name] = len(texts[path.stem][1])
        print(f"{path.name}: {told[path.name]} of {len(whole)} sentences, {sum(map(count_tokens, batches)):,} tokens")
    sentences, left = [], options.tokens
    for sentence in sentences_of(options.calibration):
        left -= len(tokenizer(sentence, truncation=True, max_length=options.length)["input_ids"])
        if left < 0:
            break
        sentences.append(sentence)
    told[options.calibration.name] = len(sentences)
    tried = batches_of(spread(sentences, _TRIED_ON))
    before = embeddings(model, tried)
    subject = Subject(
        model,
        batches_of(sentences),
        partial(agreements, texts),
        lambda small: float((before * embeddings(small, tried)).sum(1).mean()),
        options.seed,
    )
    return subject, {"sentences used": told}


def row(method: str, removed: float) -> str:
    """The name of a row."""
    return f"{method} @ {removed:g}"


def show(results: Results, names: Sequence[str]) -> str:
    """The table: a row a method and size."""
    measures: dict[str, None] = {}
    hidden = ("parameters", "kept", "seconds", "memory", "seconds of evaluation")
    found = {name: results.seeds[seed]["rows"][name] for seed in results.seeds for name in results.seeds[seed]["rows"]}
    for values in found.values():
        measures |= {name: None for name in values if name not in hidden}
    cells = []
    for name in names:
        if name in found:
            values = found[name]
            seconds = f"{values['seconds']:.0f}" if "seconds" in values else "-"
            numbers = [
                f"{values[measure]:.4g}" if values[measure] < 1e4 else f"{values[measure]:.1e}" for measure in measures
            ]
            size = [f"{values['parameters']:,}", f"{100 * values['kept']:.2f}"]
            cells.append([name, *size, *numbers, seconds, str(values.get("memory", "-"))])
    return table(["method @ removed", "parameters", "kept, %", *measures, "seconds", "peak, MiB"], cells)


def main(options: Options) -> None:
    """Run every method at every size, print the table, write the JSON."""
    methods, removed = chosen_methods(options), options.removed or REMOVED[options.task]
    made = language_model if options.task == "perplexity" else sentence_encoder
    subject, used = made(options)
    tokens = sum(map(count_tokens, subject.batches))
    print(f"calibration: {options.calibration.name}, {tokens:,} tokens in {len(subject.batches)} batches", flush=True)
    configuration = {
        "task": options.task,
        "model": options.model.resolve().name,
        "parameters": parameters(subject.model),
        "calibration tokens": tokens,
        "length": options.length,
        "ridge": RIDGE,
        "arithmetic": "float32",
        "transformers": version("transformers"),
        **used,
    }
    name = f"language_{options.task}_{options.model.resolve().name}.json"
    results = Results(options.output or Path(__file__).parent / "results" / name, configuration, torch.device("cpu"))
    original = results.measure("original", options.seed, lambda: subject.told(subject.model, {}))
    print(f"original: {original}", flush=True)
    for method in methods:
        for share in removed:
            try:
                results.measure(row(method, share), options.seed, partial(subject.measured, method, share))
            except ValueError as error:  # a budget that a method cannot meet is not the end of the others
                print(f"{row(method, share)}: left out, {error}", flush=True)
    print(f"\n{show(results, ['original', *(row(method, share) for method in methods for share in removed)])}\n")
    print(f"written: {results.path}")


if __name__ == "__main__":
    main(cast(Options, tyro.cli(Options, description=__doc__)))
