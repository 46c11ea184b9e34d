"""Synthetic tokens, for use without text: sampled from the language model itself.

A model that predicts the next token at each position can generate text (Liu et al., "LLM-QAT: Data-Free Quantization
Aware Training", 2023). Generating token by token is slow, so all positions are sampled in parallel over several passes
(Jacobi decoding). Each pass samples every token given those of the pass before, with the same random numbers. After k
passes the first k tokens equal those of sequential sampling, and later ones are close to it. Other models that read
tokens get random ones: good enough for compensation, but not for comparing neurons.

Some models do not take any tokens: they expect one that ends the sequence, or as many tokens of images as there are
images. A careful speaker changes only those positions of the example at which the model accepts any token, and puts
none there that is among the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.network.reaching import tensors_in
from nac_gpu.network.running import ExampleInputs, call, call_on, evaluating, own_inputs

POSITIONS = 8192  # of all tokens
_MOST, _FEWEST = 256, 8  # sequences
_BATCH = 4096  # tokens
_PASSES = 16
_PIECES = 64  # of a sequence, at most, for finding out where tokens may be changed
_TRIALS = 4  # random tokens are accepted if none of so many attempts fails


@dataclass(frozen=True)
class _Place:
    """A tensor of tokens among the example inputs.

    Attributes:
        leaf: index of the tensor among all leaves of the inputs.
        kinds: size of the vocabulary.
    """

    leaf: int
    kinds: int


@dataclass(frozen=True)
class _Free:
    """Where tokens may be changed, and to which.

    Attributes:
        positions: bool, the shape of a sequence.
        kinds: int64 [kinds], the tokens that may be put there.
    """

    positions: Tensor
    kinds: Tensor


class Speaker:
    """A model that reads tokens and may predict the next ones.

    Attributes:
        places: where the tokens are in its inputs; empty if it reads no tokens.

    Args:
        model: not changed.
        example_inputs: what it is called with.
        careful: only tokens that the model accepts are changed, and only to some that it accepts.

    Raises:
        Exception: anything that the model's code raises.
        ValueError: being careful, no token can be changed.
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs, *, careful: bool = False) -> None:
        self._model = model
        self._leaves, self._structure = pytree.tree_flatten(own_inputs(example_inputs))
        self._free: dict[int, _Free] = {}
        self.places = self._found()
        if careful and self.places:
            self._free = self._accepted()
        self._speaking = [self._next(place) for place in self.places]

    def speaks(self) -> bool:
        """Whether the model predicts the next token."""
        return any(self._speaking)

    def batches(self, seed: int = 0, ranks: Ranks = ALONE) -> list[ExampleInputs]:
        """Batches with synthetic tokens; everything else is repeated from the example inputs.

        Args:
            seed: of the tokens; the global random state is not touched.
            ranks: the processes that divide the batches among them.

        Raises:
            RankError: another rank failed, or was lost.
        """
        with evaluating(self._model):
            size = self._fitting(max(1, min(_MOST // _FEWEST, _BATCH // self._length())))
            count = max(_FEWEST, min(_MOST, POSITIONS // self._length()))
            numbers = range(-(-count // size))
            return list(ranks.share(numbers, lambda number: self._made(size, seed * len(numbers) + number)))

    def drawn(self, most: int, seed: int = 0) -> ExampleInputs:
        """A batch of random tokens: as many sequences as have at most so many tokens together, at least one.

        If the model accepts no other batch size, that of the example inputs.

        Args:
            most: tokens.
            seed: as for `batches`.
        """
        with evaluating(self._model):
            size = self._fitting(max(1, most // self._length()))
            return self._with(self._random(size, torch.Generator().manual_seed(seed)))

    def _found(self) -> list[_Place]:
        """Integer tensors of the example inputs that embeddings read unchanged."""
        kinds: dict[int, int] = {}
        storages = {
            leaf.untyped_storage().data_ptr(): number
            for number, leaf in enumerate(self._leaves)
            if isinstance(leaf, Tensor) and not leaf.is_floating_point() and leaf.ndim > 0 and leaf.numel()
        }

        def look(module: nn.Embedding, given: tuple[Any, ...]) -> None:
            number = storages.get(given[0].untyped_storage().data_ptr()) if given else None
            if number is not None:
                kinds[number] = min(kinds.get(number, module.num_embeddings), module.num_embeddings)

        hooks = [m.register_forward_pre_hook(look) for m in self._model.modules() if isinstance(m, nn.Embedding)]
        try:
            if hooks and storages:
                with evaluating(self._model):
                    call_on(self._model, pytree.tree_unflatten(self._leaves, self._structure))
        finally:
            for hook in hooks:
                hook.remove()
        return [_Place(number, count) for number, count in sorted(kinds.items())]

    def _with(self, tokens: Mapping[int, Tensor]) -> ExampleInputs:
        """The example inputs with new tokens, by leaf; tensors of the same batch size are repeated to the new one."""
        number, new = next(iter(tokens.items()))
        old = len(self._leaves[number])

        def repeated(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != old or len(new) == old:
                return leaf
            return leaf[torch.arange(len(new), device=leaf.device) % old]

        leaves = [tokens[n] if n in tokens else repeated(leaf) for n, leaf in enumerate(self._leaves)]
        return pytree.tree_unflatten(leaves, self._structure)

    def _random(self, size: int, generator: torch.Generator) -> dict[int, Tensor]:
        made = {}
        for place in self.places:
            leaf, free = self._leaves[place.leaf], self._free.get(place.leaf)
            kinds = place.kinds if free is None else len(free.kinds)
            drawn = torch.randint(kinds, (size, *leaf.shape[1:]), generator=generator)
            if free is None:
                made[place.leaf] = drawn.to(leaf)
            else:
                made[place.leaf] = self._kept(place, free.kinds[drawn].to(leaf))
        return made

    def _kept(self, place: _Place, tokens: Tensor) -> Tensor:
        """Tokens in which those of the example stand where none may be changed."""
        if place.leaf not in self._free:
            return tokens
        leaf = self._leaves[place.leaf]
        free = self._free[place.leaf].positions.to(leaf.device)
        return torch.where(free, tokens, leaf[torch.arange(len(tokens), device=leaf.device) % len(leaf)])

    def _accepted(self) -> dict[int, _Free]:
        """What may be changed, found by trying, at each place in turn.

        Raises:
            ValueError: nothing.
        """
        nowhere = {
            place.leaf: _Free(torch.zeros(self._leaves[place.leaf].shape[1:], dtype=torch.bool), torch.zeros(1).long())
            for place in self.places
        }
        self._free = dict(nowhere)
        for place in self.places:
            leaf = self._leaves[place.leaf].cpu()
            between = torch.arange(int(leaf.min()), int(leaf.max()) + 1)
            for kinds in (torch.arange(place.kinds), between, leaf.unique().long()):
                found = self._search(place, kinds, torch.arange(leaf[0].numel()), max(1, leaf[0].numel() // _PIECES))
                if self._accepts(place, kinds, found):
                    break
                self._free[place.leaf] = nowhere[place.leaf]
        if not any(bool(free.positions.any()) for free in self._free.values()):
            raise ValueError("no tokens other than those of the example are accepted")
        return self._free

    def _search(self, place: _Place, kinds: Tensor, positions: Tensor, least: int) -> Tensor:
        """The positions at which these tokens are accepted, by bisection down to so many positions."""
        if self._accepts(place, kinds, positions):
            return positions
        if len(positions) <= least:
            return positions[:0]
        half = len(positions) // 2
        return torch.cat([self._search(place, kinds, part, least) for part in (positions[:half], positions[half:])])

    def _accepts(self, place: _Place, kinds: Tensor, positions: Tensor) -> bool:
        """Whether the model takes any of these tokens at these positions; if so, `_free` says so from now on."""
        leaf = self._leaves[place.leaf].cpu()
        free = torch.zeros(leaf[0].numel(), dtype=torch.bool)
        free[positions] = True
        kinds = kinds[~torch.isin(kinds, leaf.flatten(1)[:, ~free])]
        if not len(positions) or len(kinds) < 2:
            return False
        self._free[place.leaf] = _Free(free.view(leaf.shape[1:]), kinds)
        try:
            with evaluating(self._model):
                for seed in range(_TRIALS):
                    call(self._model, self._with(self._random(len(leaf), torch.Generator().manual_seed(seed))))
        except Exception:  # the user's code may raise anything
            return False
        return True

    def _fitting(self, size: int) -> int:
        """A batch size, or that of the example inputs if the model does not accept it."""
        try:
            call(self._model, self._with(self._random(size, torch.Generator().manual_seed(0))))
        except Exception:  # the user's code may raise anything
            return len(self._leaves[self.places[0].leaf])
        return size

    def _length(self) -> int:
        return max(self._leaves[place.leaf][0].numel() for place in self.places)

    def _said(self, tokens: Mapping[int, Tensor], place: _Place) -> Tensor | None:
        """Logits of the next tokens, [sequences, length, vocabulary], or None if no output has this shape."""
        wanted = tokens[place.leaf].shape
        for value in tensors_in(call(self._model, self._with(tokens))):
            if value.ndim == 3 and value.is_floating_point() and value.shape[:2] == wanted and value.shape[2] > 1:
                return value[..., : place.kinds]
        return None

    def _next(self, place: _Place) -> bool:
        """Whether the model is causal: the output at a position depends on its token, but on no later one."""
        if self._leaves[place.leaf].ndim != 2 or self._leaves[place.leaf].shape[1] < 2:
            return False
        with evaluating(self._model):
            generator = torch.Generator().manual_seed(0)
            tokens = self._random(len(self._leaves[place.leaf]), generator)
            changed = dict(tokens)
            changed[place.leaf] = tokens[place.leaf].clone()
            if place.leaf in self._free:  # one more may not be accepted
                changed[place.leaf][:, -1] = self._random(len(tokens[place.leaf]), generator)[place.leaf][:, -1]
            else:
                changed[place.leaf][:, -1] = (changed[place.leaf][:, -1] + 1) % place.kinds
            before, after = self._said(tokens, place), self._said(changed, place)
        if before is None or after is None or before.shape[2] < place.kinds:
            return False
        apart = (before - after).abs().amax(dim=(0, 2)) / before.abs().max().clamp_min(1e-12)
        return float(apart[:-1].max()) < 1e-4 < float(apart[-1])

    def _made(self, size: int, seed: int) -> ExampleInputs:
        generator = torch.Generator().manual_seed(seed)
        tokens = self._random(size, generator)
        for place, speaks in zip(self.places, self._speaking, strict=True):
            if not speaks:
                continue
            length = tokens[place.leaf].shape[1]
            luck = torch.rand(size, length, generator=generator).to(tokens[place.leaf].device)
            for _ in range(min(length - 1, _PASSES)):
                scores = self._said(tokens, place)
                assert scores is not None, "it speaks"
                if place.leaf in self._free:
                    banned = torch.ones(scores.shape[2], dtype=torch.bool, device=scores.device)
                    banned[self._free[place.leaf].kinds.to(scores.device)] = False
                    scores = scores.masked_fill(banned, -torch.inf)
                summed = scores.float().softmax(2).cumsum(2)
                drawn = torch.searchsorted(summed, (luck * summed[..., -1])[..., None]).squeeze(2)
                tokens[place.leaf][:, 1:] = drawn[:, :-1].clamp_max(place.kinds - 1)
                tokens[place.leaf] = self._kept(place, tokens[place.leaf])
        return self._with(tokens)
