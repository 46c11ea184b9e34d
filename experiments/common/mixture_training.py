"""A small mixture of experts of Mixtral's kind, trained on texts: its tokenizer, its data, training that can stop."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nac_gpu.files.atomic import atomically, atomically_folder

_EVERY = 60.0  # seconds from one checkpoint to the next
_WARMUP = 0.02  # share of the training in which the rate rises
_LEAST = 0.05  # the last rate, as a share of the highest
_MEMORY = 0.98  # of the running mean of the loss


@dataclass(frozen=True)
class Shape:
    """The sizes of a network, with embeddings that the head shares.

    Attributes:
        vocabulary: tokens.
        width: channels between the layers.
        layers: how many.
        heads: of attention; half as many have keys and values of their own.
        experts: in each layer.
        picked: of them, for a token.
        neurons: of an expert.
    """

    vocabulary: int = 2048
    width: int = 192
    layers: int = 4
    heads: int = 6
    experts: int = 8
    picked: int = 2
    neurons: int = 256


@dataclass(frozen=True)
class Training:
    """How it learns: AdamW; the rate rises and falls with the time that has passed, so that the end is always reached.

    Attributes:
        minutes: of training, together with those before the process was stopped.
        length: tokens of a window.
        rows: windows of a batch, beginning anywhere in the text.
        rate: the highest.
        decay: of weights.
        balance: weight of the loss that makes experts equally busy.
        seed: of the first weights and of the batches.
    """

    minutes: float
    length: int = 256
    rows: int = 8
    rate: float = 2e-3
    decay: float = 0.1
    balance: float = 0.02
    seed: int = 0


def split(text: str, held_out: float) -> tuple[str, str]:
    """The first part of a text, and the last one, of this share of its characters; cut at the end of a line."""
    cut = text.rfind("\n", 0, max(1, round(len(text) * (1 - held_out)))) + 1
    return text[:cut], text[cut:]


def made_tokenizer(texts: Sequence[str], vocabulary: int, folder: Path) -> Any:
    """The tokenizer in a folder; if there is none yet, pairs of bytes are joined as these texts suggest."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    if not folder.exists():
        learnt = ByteLevelBPETokenizer()
        learnt.train_from_iterator([line for text in texts for line in text.splitlines(True)], vocab_size=vocabulary)
        with atomically_folder(folder) as partial:
            PreTrainedTokenizerFast(tokenizer_object=learnt._tokenizer).save_pretrained(partial)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encoded(tokenizer: Any, text: str) -> Tensor:
    """The tokens of a text."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def untrained(shape: Shape, seed: int) -> Any:
    """The network with random weights."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.neurons,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=max(1, shape.heads // 2),
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.picked,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return MixtralForCausalLM(config)


def rate_at(passed: float, highest: float) -> float:
    """The rate after this share of the training: it rises linearly, then falls as half a cosine."""
    if passed < _WARMUP:
        return highest * (passed + 1e-3) / (_WARMUP + 1e-3)
    angle = math.pi * min(1.0, (passed - _WARMUP) / (1 - _WARMUP))
    return highest * (_LEAST + (1 - _LEAST) * (1 + math.cos(angle)) / 2)


class _State:
    """What a stopped training needs to go on: weights, AdamW's moments, and how far it has come."""

    def __init__(self, model: nn.Module, training: Training, path: Path) -> None:
        """Begin, or go on from the checkpoint.

        Raises:
            ValueError: the checkpoint is that of another training.
        """
        self.model, self.path, self.recipe = model, path, {**vars(training)}
        decayed = [value for value in model.parameters() if value.ndim > 1]
        others = [value for value in model.parameters() if value.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": training.decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=training.rate, betas=(0.9, 0.95))
        self.steps, self.seconds, self.loss = 0, 0.0, math.nan
        if path.exists():
            kept = torch.load(path, weights_only=True)
            if kept["recipe"] != self.recipe:
                raise ValueError(f"{path.name} is that of {kept['recipe']}, not {self.recipe}: give another --folder")
            model.load_state_dict(kept["model"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.steps, self.seconds, self.loss = kept["steps"], kept["seconds"], kept["loss"]

    def keep(self) -> None:
        """Write the checkpoint."""
        found = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "recipe": self.recipe}
        with atomically(self.path) as partial:
            torch.save(found | {"steps": self.steps, "seconds": self.seconds, "loss": self.loss}, partial)

    def step(self, batch: Tensor, rate: float, balance: float) -> None:
        """Learn a batch of windows."""
        found = self.model(input_ids=batch, labels=batch, output_router_logits=True, use_cache=False)
        # the model's own loss has the balance in it, at another weight
        weight = getattr(self.model, "router_aux_loss_coef", 0.0)
        plain = found.loss - weight * found.aux_loss
        self.optimizer.zero_grad()
        (plain + balance * found.aux_loss).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        value = float(plain.detach())
        self.loss = value if math.isnan(self.loss) else _MEMORY * self.loss + (1 - _MEMORY) * value
        self.steps += 1


def trained(shape: Shape, training: Training, tokens: Tensor, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The network in a folder, trained there first if it is not complete; a training that was stopped goes on.

    Args:
        shape: of the network.
        training: how it learns.
        tokens: the text.
        folder: where the checkpoint is.

    Returns:
        The network in eval mode, and what the training was like.
    """
    model = untrained(shape, training.seed)
    state, most = _State(model, training, folder / "checkpoint.pt"), 60 * training.minutes
    model.train()
    generator = torch.Generator().manual_seed(training.seed + state.steps)
    window = torch.arange(training.length)
    kept = state.seconds
    while state.seconds < most or not state.steps:
        start = time.perf_counter()
        first = torch.randint(len(tokens) - training.length + 1, (training.rows, 1), generator=generator)
        state.step(tokens[first + window], rate_at(state.seconds / most, training.rate), training.balance)
        state.seconds += time.perf_counter() - start
        if state.seconds - kept >= _EVERY or state.seconds >= most:
            kept = state.seconds
            state.keep()
            print(
                f"step {state.steps}, {kept / 60:.1f} of {training.minutes:g} minutes: loss {state.loss:.3f}",
                flush=True,
            )
    seen = state.steps * training.rows * training.length
    told = {"steps": state.steps, "passes": round(seen / len(tokens), 2), "loss": round(state.loss, 4)}
    return model.eval().requires_grad_(False), told
