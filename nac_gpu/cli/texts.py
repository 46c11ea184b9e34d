"""Text files as calibration data, read with the tokenizer in a model's own folder."""

import codecs
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nac_gpu as nac

_TEXT, _TENSORS = (".txt", ".md"), (".npy", ".safetensors", ".pt", ".pth", ".bin")
_START = 1 << 16  # bytes of a file that are looked at
#: How names of files begin in which tokenizers are kept.
_KEPT = ("tokenizer", "vocab", "spiece", "sentencepiece", "spm", "source.spm")


@dataclass(frozen=True)
class Reader:
    """How a model of transformers reads text.

    Attributes:
        tokenizer: its tokenizer, with `save_pretrained`.
        joined: it predicts the next token, so documents are joined; else each is a row of its own.
        takes: names of its forward pass's arguments.
        longest: tokens that it reads at once, at most; None if that is not known.
        start: the token that its decoder starts with, for models with an encoder and a decoder; else None.
    """

    tokenizer: Callable[..., Any]
    joined: bool
    takes: frozenset[str]
    longest: int | None = None
    start: int | None = None

    def batches(self, path: Path, tokens: int, length: int, seed: int) -> list[dict[str, Tensor]]:
        """The batches of a text file, with the arguments that the model takes."""
        length = min(length, self.longest or length)
        found = nac.text_batches(self.tokenizer, path, tokens=tokens, length=length, join=self.joined, seed=seed)
        if self.start is not None:
            for batch in found:  # the decoder reads the same text, one token later
                first = torch.full_like(batch["input_ids"][:, :1], self.start)
                batch["decoder_input_ids"] = torch.cat([first, batch["input_ids"][:, :-1]], dim=1)
        return [{name: value for name, value in batch.items() if name in self.takes} for batch in found]


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer. Without them, transformers may make one that knows no word."""
    return any(entry.name.startswith(_KEPT) or entry.suffix == ".tiktoken" for entry in folder.iterdir())


def reader_of(folder: Path, cls: Any, config: Any) -> Reader:
    """How the model in a folder of transformers reads text.

    Args:
        folder: of the model.
        cls: its class.
        config: its configuration.

    Raises:
        ValueError: it has no tokenizer, or one that cannot be opened.
    """
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise ValueError(
            f"{folder} has no tokenizer, expected tokenizer.json or such beside config.json, as the tokenizer's "
            "save_pretrained writes it"
        )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of any kind: packages may be missing, files damaged
        raise ValueError(f"{folder}: its tokenizer cannot be opened: {' '.join(str(error).split())}") from error
    own = config.get_text_config()
    limits = [getattr(tokenizer, "model_max_length", None), getattr(own, "max_position_embeddings", None)]
    both = bool(getattr(config, "is_encoder_decoder", False))
    forward = getattr(cls, "forward", None)  # AutoModel, of folders that name no class, has none
    start = getattr(config, "decoder_start_token_id", None)
    return Reader(
        tokenizer,
        joined=not both and forward is not None and bool(cls.can_generate()),
        takes=frozenset(inspect.signature(forward).parameters if forward else ("input_ids", "attention_mask")),
        longest=min((int(limit) for limit in limits if isinstance(limit, int) and limit > 0), default=None),
        start=(tokenizer.pad_token_id or 0 if start is None else start) if both else None,
    )


def copy_tokenizer(folder: Path, output: Path) -> None:
    """Save the tokenizer of a folder of transformers into another one, if there is one."""
    from transformers import AutoTokenizer

    if has_tokenizer(folder):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokenizer.save_pretrained(output)


def is_text(path: Path) -> bool:
    """Whether a file of calibration data is text: by its name, else by its first bytes."""
    suffix = path.suffix.lower()
    if suffix in (*_TEXT, *_TENSORS) or not path.is_file():
        return suffix in _TEXT and not path.is_dir()
    with path.open("rb") as file:
        start = file.read(_START)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return b"\0" not in start


def calibration_text(
    path: Path, reader: Callable[[], Reader] | None, example: nac.ExampleInputs, *, tokens: int, length: int, seed: int
) -> list[dict[str, Tensor]]:
    """Batches of a text file for a model of transformers.

    Args:
        path: of the file.
        reader: opens the model's tokenizer; None if the model is no folder of transformers.
        example: example inputs, which must have names.
        tokens: number of tokens to use.
        length: tokens of a row.
        seed: decides which parts of the text are used.

    Raises:
        ValueError: the model is no folder of transformers, has no tokenizer or takes no text; or as
            `nac_gpu.text_batches`.
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--calibration {path}: there is no such file")
    for option, value in (("--tokens", tokens), ("--length", length)):
        if value < 1:
            raise ValueError(f"{option} {value}: expected at least 1")
    if reader is None:
        raise ValueError(
            f"--calibration {path} is text, which needs a tokenizer: expected a folder of transformers as the model"
        )
    if not isinstance(example, Mapping):
        raise ValueError(
            f"--calibration {path} is text, which models get by name: expected --inputs input_ids=int:1,16 or none"
        )
    read = reader()
    if "input_ids" not in read.takes:
        raise ValueError(f"--calibration {path} is text, but the model takes no input_ids")
    try:
        return read.batches(path, tokens, length, seed)
    except ValueError as error:
        raise ValueError(f"--calibration {path}: {error}") from error
