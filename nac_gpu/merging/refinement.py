"""Refinement: the merged network is trained to reproduce the original's outputs, without labels.

Compensation refits one consumer at a time, and only the columns that read the merged group. Refinement trains all
tensors that merging changed together, by gradient descent on the difference of the outputs (Hinton et al., "Distilling
the Knowledge in a Neural Network", 2015; for few inputs without labels, Wang et al., "Compressing Models with Few
Samples: Mimicking then Replacing", CVPR 2022). A few hundred inputs are enough because they are augmented differently
in each pass: mixed in pairs (Zhang et al., "mixup", ICLR 2018) and, if they are images, shifted and mirrored. Augmented
inputs need no labels, because the original network provides the targets.
"""

import contextlib
import math
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from nac_gpu.calibration.batches import Batches, Divided, of_tokens, parts_of, size_of
from nac_gpu.calibration.dream import COUNT, usual_count
from nac_gpu.distributed.fallbacks import StepError, attempt
from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.network.comparing import mean_change
from nac_gpu.network.copying import copied
from nac_gpu.network.gradients import GradientsKept
from nac_gpu.network.judging import answers, answers_in, apart
from nac_gpu.network.moving import sent
from nac_gpu.network.precision import multiplies_bfloat16
from nac_gpu.network.running import ExampleInputs, arguments, evaluating, set_mode_again

BATCH = 64  # inputs
TOKENS = 1024  # of a batch
PASSES = 80  # over the inputs
STEPS = 1280  # upper limit for small inputs; lower for large ones
_RATE = 6e-4  # learning rate of Adam
_RATE_CAREFUL = 3e-4  # of synthetic inputs, which resemble real ones only partly, and of text
_WARMUP = 20  # steps; at most a fifth of all
_NEAR = 1e-6  # an error below this share of the outputs' variance needs no refinement
_SHIFT = 8  # images are shifted by up to 1/8 of their side


class Amount(NamedTuple):
    """How much is trained.

    Attributes:
        passes: over the inputs.
        most: inputs, or tokens, over all passes; None for no limit.
    """

    passes: int = PASSES
    most: int | None = None


def learn(
    small: nn.Module,
    model: nn.Module,
    touched: Collection[str],
    inputs: Divided,
    amount: Amount,
    *,
    synthetic: bool = False,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> str:
    """Train a merged network to reproduce the original's outputs, in place.

    Only the parameters that merging changed are trained, whether or not they require gradients. The result is kept
    only if it reduces the error on inputs that were kept aside. A failure is a warning: the network is as it was.

    Args:
        small: the merged network.
        model: the original; not changed, and not run: a copy is.
        touched: names of the tensors that merging changed.
        inputs: of both; tensors are joined and divided into batches of 64, if the networks take those. The result is
            judged by those kept aside; by those trained on if there are none.
        amount: how much is trained; at most 1280 steps are made, fewer for large images.
        synthetic: the inputs are synthetic.
        seed: of the augmentation; the global random state is not touched.
        ranks: the processes; rank 0 does the work.

    Returns:
        A line that says what training brought, or why there was none; empty if none was asked for.

    Raises:
        RankError: another rank failed or was lost.
    """
    weights = {name: value for name, value in small.named_parameters() if name in touched}
    if not weights or not amount.passes:
        return ""

    def learnt(_: None) -> Learnt | None:
        _check_memory(weights)
        rate = _RATE_CAREFUL if synthetic or of_tokens(inputs.fit) else _RATE
        return _Learning(copied(small), copied(model), weights, inputs).found(amount, rate, seed)

    try:
        (found,) = attempt(lambda ranks: [*ranks.share([None], learnt)], ranks, survives_memory=True)
    except StepError as error:  # an operation without gradient, say, or too little memory
        line = f"merged and compensated, but not refined, because training failed ({error}); refine=0 skips it"
        if not ranks.rank:
            warnings.warn(line, stacklevel=2)
        return line
    if found is None:
        return "merged and compensated, but not refined, because the outputs cannot be compared"
    with torch.no_grad():
        for name, value in found.weights.items():
            weights[name].copy_(value)
    on = "inputs left out" if inputs.judged else "the inputs"
    if found.weights:
        return f"refined: the error on {on} fell from {found.before:.3g} to {found.after:.3g}"
    if found.before < _NEAR:
        return ""
    return f"not refined: the error on {on} was {found.before:.3g} before and {found.after:.3g} after training"


@dataclass(frozen=True)
class Learnt:
    """What training brought.

    Attributes:
        weights: by name; empty if they are no better than before.
        before: the error of the answers.
        after: the same with the trained weights; NaN if it is not finite.
    """

    weights: Mapping[str, Tensor]
    before: float
    after: float


def _check_memory(weights: Mapping[str, nn.Parameter]) -> None:
    """Check that training fits in memory; otherwise the system might kill the process.

    Training needs four numbers for each weight: value, gradient, and the two moments of Adam.

    Raises:
        RuntimeError: it would take more than half of the memory.
    """
    device = next(iter(weights.values())).device
    needed = 16 * sum(value.numel() for value in weights.values())
    there = needed * 2
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there / 2:
        raise RuntimeError(
            f"it needs {needed / 1e9:.1f} GB, expected at most half of the {there / 1e9:.1f} GB of {device}"
        )


class _Learning:
    """Training of the smaller network, with weights of its own until the result is accepted."""

    def __init__(
        self,
        small: nn.Module,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        inputs: Divided,
    ) -> None:
        self._small, self._model = small, model
        self._types = {name: value.dtype for name, value in weights.items()}
        doubles = any(dtype == torch.float64 for dtype in self._types.values())
        self._exact = torch.float64 if doubles else torch.float32
        self._weights = {
            name: value.detach().to(self._exact, copy=True).requires_grad_() for name, value in weights.items()
        }
        self._device = next(iter(weights.values())).device
        self._inputs = rebatched(inputs.fit)
        self._batches, self._judged = inputs.fit, inputs.judged
        self._kept: contextlib.AbstractContextManager[object] = contextlib.nullcontext()

    def found(self, amount: Amount, rate: float, seed: int) -> Learnt | None:
        """What training brought; None if no outputs are comparable."""
        with evaluating(self._small), evaluating(self._model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "RNN module weights are not part of")  # those that are trained are not
            self._prepare_recurrent()
            try:
                before = attempt(lambda _: self._distance())
            except StepError:  # they may take batches of the original size only
                self._inputs = list(self._batches)
                before = self._distance()
            if before is None:
                return None
            if before < _NEAR:
                return Learnt({}, before, before)
            steps = self._steps(amount)
            self._autocast = self._fitting_autocast()
            with torch.enable_grad():
                self._descend(steps, rate, torch.Generator().manual_seed(seed))
            after = self._distance()
        better = after is not None and after < before  # False for NaN
        found = {name: value.detach().to(self._types[name]) for name, value in self._weights.items()} if better else {}
        return Learnt(found, before, math.nan if after is None else after)

    def _fitting_autocast(self) -> contextlib.AbstractContextManager[object]:
        """Autocast to bfloat16 if that is fast here and the networks' code runs with it."""
        fast = all(dtype == torch.float32 for dtype in self._types.values()) and multiplies_bfloat16(self._device)
        autocast = torch.autocast(self._device.type, torch.bfloat16, enabled=fast)
        try:
            with torch.no_grad(), autocast:
                attempt(lambda _: self._apart(self._inputs[0]))
        except StepError:  # such as an in-place addition to a float32 tensor
            return contextlib.nullcontext()
        return autocast

    def _prepare_recurrent(self) -> None:
        """Recurrent layers in training mode, the only one in which those of cuDNN have gradients, without dropout.

        So each runs as one operation: in bfloat16 on a CPU, that is 60 times as fast as step by step.
        """
        for module in (*self._small.modules(), *self._model.modules()):
            if isinstance(module, nn.RNNBase):
                module.training, module.dropout = True, 0.0

    def _steps(self, amount: Amount) -> int:
        leaf = next((leaf for leaf in pytree.tree_leaves(self._inputs[0]) if isinstance(leaf, Tensor)), None)
        steps = STEPS if leaf is None else STEPS * usual_count(leaf) // COUNT
        if amount.most is not None:
            steps = min(steps, amount.most * len(self._inputs) // sum(size_of(batch) for batch in self._inputs))
        return max(1, min(steps, amount.passes * len(self._inputs)))

    def _descend(self, steps: int, rate: float, generator: torch.Generator) -> None:
        optimizer = torch.optim.Adam(self._weights.values(), lr=rate)
        warmup = min(_WARMUP, max(1, steps // 5))
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / warmup) * (1 - step / steps)
        )
        for step, batch in zip(range(steps), augmented(self._inputs, generator), strict=False):
            with self._autocast:
                distance = self._apart(batch)
                if not step and distance is not None and not distance.requires_grad:
                    self._kept = GradientsKept()
                    distance = self._apart(batch)
            if not step and distance is not None and not distance.requires_grad:
                raise ValueError("no gradient reaches the weights")
            if distance is None or not distance.requires_grad:
                continue
            slopes = torch.autograd.grad(distance, list(self._weights.values()), allow_unused=True)
            for value, slope in zip(self._weights.values(), slopes, strict=True):
                value.grad = slope
            optimizer.step()
            scheduler.step()

    def _apart(self, batch: ExampleInputs) -> Tensor | None:
        """How far the answers are apart, see `nac_gpu.network.judging.apart`."""
        with torch.no_grad():
            expected = answers(self._model, batch)
        typed = {name: value.to(self._types[name]) for name, value in self._weights.items()}
        set_mode_again(self._small)  # nothing cached of the weights of another step
        with self._kept:
            found = answers_in(functional_call(self._small, typed, *arguments(batch)), batch)
        return apart(found, expected)

    def _distance(self) -> float | None:
        """The mean error over the inputs that were kept aside, or else over all, without augmentation."""
        with torch.no_grad():
            return mean_change(self._apart(batch) for batch in self._judged or self._inputs)


def rebatched(batches: Batches) -> list[ExampleInputs]:
    """Batches of 64 if all leaves are floating tensors [batch, ...] of one batch size; else smaller ones of tokens."""
    if not all(_divisible(batch) for batch in batches):
        return [part for batch in batches for part in _smaller(batch)]
    leaves, structures = zip(*(pytree.tree_flatten(batch) for batch in batches), strict=True)
    if any(structure != structures[0] for structure in structures):
        return list(batches)
    if any(len({leaf.shape[1:] for leaf in alike}) > 1 for alike in zip(*leaves, strict=True)):
        return list(batches)
    parts = zip(*(torch.cat(alike).split(BATCH) for alike in zip(*leaves, strict=True)), strict=True)
    return [pytree.tree_unflatten(list(part), structures[0]) for part in parts]


def _smaller(batch: ExampleInputs) -> list[ExampleInputs]:
    """Parts of a batch of tokens: many small steps are better than a few large ones, and logits need much memory."""
    return parts_of(batch, TOKENS) if of_tokens([batch]) else [batch]


def _divisible(batch: ExampleInputs) -> bool:
    leaves = pytree.tree_leaves(batch)
    floating = all(isinstance(leaf, Tensor) and leaf.ndim > 1 and leaf.is_floating_point() for leaf in leaves)
    return bool(leaves) and floating and len({len(leaf) for leaf in leaves}) == 1


def augmented(inputs: Sequence[ExampleInputs], generator: torch.Generator) -> Iterator[ExampleInputs]:
    """An endless stream of shuffled batches, augmented differently in each pass.

    Args:
        inputs: batches, as `joined` makes them.
        generator: on the CPU.
    """
    mixable = all(_divisible(batch) for batch in inputs)
    while True:
        for at in torch.randperm(len(inputs), generator=generator).tolist():
            batch = inputs[at]
            if not mixable:
                yield batch
                continue
            other = inputs[int(torch.randint(len(inputs), (), generator=generator))]
            yield _mixed(_moved(batch, generator), _moved(other, generator), generator)


def _mixed(batch: ExampleInputs, other: ExampleInputs, generator: torch.Generator) -> ExampleInputs:
    """Mixup of half of the inputs with inputs of another batch, in random shares."""
    count, others = (len(pytree.tree_leaves(each)[0]) for each in (batch, other))
    share = torch.rand(count, generator=generator)
    share = torch.where(torch.rand(count, generator=generator) < 0.5, share, 1.0)
    partners = torch.randint(others, (count,), generator=generator)
    device = pytree.tree_leaves(batch)[0].device
    share, partners = sent(share, device), sent(partners, device)

    def mixed(a: Tensor, b: Tensor) -> Tensor:
        part = share.view(-1, *[1] * (a.ndim - 1)).to(a)
        return part * a + (1 - part) * b[partners]

    return pytree.tree_map(mixed, batch, other)


def _moved(batch: ExampleInputs, generator: torch.Generator) -> ExampleInputs:
    """Images shifted by up to an eighth of their sides, with reflected edges, and half of them mirrored."""

    def moved(images: Tensor) -> Tensor:
        if images.ndim != 4:
            return images
        count, device = len(images), images.device
        most = [size // _SHIFT for size in images.shape[2:]]
        padded = nn.functional.pad(images, (most[1], most[1], most[0], most[0]), mode="reflect")
        shifts = [torch.randint(2 * length + 1, (count, 1), generator=generator) for length in most]
        rows, columns = (s + torch.arange(size) for s, size in zip(shifts, images.shape[2:], strict=True))
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
        found = padded.permute(0, 2, 3, 1)[  # channels last: whole pixels are gathered
            torch.arange(count, device=device)[:, None, None],
            sent(rows[:, :, None], device),
            sent(columns[:, None], device),
        ]
        return found.permute(0, 3, 1, 2).contiguous()

    return pytree.tree_map(moved, batch)
