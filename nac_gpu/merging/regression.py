"""The regression that refits a consumer, with a penalty chosen on inputs that it was not fitted to.

The errors of a consumer's outputs are regressed on the values that it reads. How much may be changed depends on how
much is known: with as many samples as values, a fit that is perfect on them can be worse than none on others. So the
samples are divided into folds. Each penalty of a short list is fitted to all folds but one and judged on that one;
the list ends with "only the mean" and "no change". The best is then fitted to all of them.

Moments are kept for each fold, so that leaving one out means adding up the others. Where there are more values than
samples could be kept as moments of, the samples themselves are kept, and the regression is solved in its dual form.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from nac_gpu.calibration.moments import FOLDS, Moments, damped

#: Ridge penalties, relative to the mean square of the values, from the weakest to the strongest.
PENALTIES = (1e-3, 1e-2, 5e-2, 2e-1, 1.0)
USUAL_NEURONS, USUAL_VALUES = 1e-2, 5e-2  # chosen unless another is clearly better
_CLEARLY = 1.03  # times the error of the best: what was left out is a sample, too
MOST_VALUES = 4096  # with more, samples are kept in place of moments
_MOST_KEPT = 4096  # of those samples
_MOST_ROWS = 32768  # of samples that only moments are kept of
_MOST_SPLITS = 512  # values, with which each fold is left out in turn; with more, only two of them are
_MOST_OUTPUTS = 64  # penalties are compared on so many random combinations of the outputs, if there are twice as many

Spread = Callable[[Tensor], Tensor]
T = TypeVar("T")


@dataclass
class Terms:
    """Sums over the samples of one fold.

    Attributes:
        values: moments of the values that the consumer reads, with themselves, [p, p].
        errors: of these values with the errors of the consumer's outputs, [p, out].
        energy: the sum of the squared errors over samples and outputs.
        variance: the sum of the squared deviations of the original's outputs from their mean in a batch.
        neurons: of the merged neurons, [k, k]; only where the consumer reads several values of each neuron.
        missing: of the merged neurons with what the original neurons have beside their sum, [k, n]; likewise.
        samples: values [rows, p], errors [rows, out] and weights [rows], in place of their moments where p is large.
        comparable: both networks called the consumer with the same samples. A router may send other samples to an
            expert after merging; such an expert is not refitted.
    """

    values: Moments = field(default_factory=Moments)
    errors: Moments = field(default_factory=Moments)
    energy: float = 0.0
    variance: float = 0.0
    neurons: Moments = field(default_factory=Moments)
    missing: Moments = field(default_factory=Moments)
    samples: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    comparable: bool = True

    @property
    def count(self) -> float:
        """How many samples there are, by weight."""
        return self.values.count or sum(float(weights.sum()) for _, _, weights in self.samples)

    def add(self, values: Tensor, whole: Tensor, made: Tensor, weights: Tensor) -> None:
        """Add samples: values [rows, p], outputs of the original and of the merged [rows, out], weights [rows]."""
        errors = whole - made
        self.variance += float(((whole - whole.mean(0)).square().sum(1).double() * weights).sum())
        self.energy += float((errors.square().sum(1).double() * weights).sum())
        if values.shape[1] > MOST_VALUES:
            self.samples.append((values, errors, weights))
            return
        self.values.add(values, values, weights)
        self.errors.add(values, errors, weights)

    def take(self, other: "Terms") -> None:
        """Add the sums of another batch, whose memory is reused."""
        for name in ("neurons", "missing", "values", "errors"):
            getattr(self, name).take(getattr(other, name))
        self.energy += other.energy
        self.variance += other.variance
        self.samples += other.samples
        self.comparable = self.comparable and other.comparable


def rows_of(values: int) -> int:
    """How many samples are used of a consumer that reads so many values, over all inputs."""
    return _MOST_ROWS if values <= MOST_VALUES else _MOST_KEPT


@dataclass(frozen=True)
class Fit:
    """Corrections of a consumer, and what they are worth.

    Attributes:
        weight: to be added to its weight, float64 [p, out].
        constant: to be added to its outputs, float64 [out].
        before: mean squared error of its outputs, summed over them, without any correction.
        after: the same with it, on samples that it was not fitted to.
        variance: of the original's outputs, likewise.
        chosen: the penalty, in words.
    """

    weight: Tensor
    constant: Tensor
    before: float
    after: float
    variance: float
    chosen: str

    @property
    def lost(self) -> float:
        """The share of the outputs' variance that is lost, on samples that it was not fitted to."""
        return self.after / self.variance if self.variance > 0 else 0.0


@dataclass(frozen=True)
class _Penalties:
    """What is fitted: penalties of both regressions, None for leaving one out.

    Attributes:
        neurons: of the regression on merged neurons.
        values: of that on values.
        constant: the outputs get a constant.
    """

    neurons: float | None
    values: float | None
    constant: bool

    def __str__(self) -> str:
        found = [f"{kind} {one:g}" for kind, one in (("neurons", self.neurons), ("values", self.values)) if one]
        return "ridge " + ", ".join(found) if found else "mean" if self.constant else "none"


def fitted(folds: Sequence[Terms], spread: Spread | None, *, intercept: bool) -> Fit | None:
    """The best correction of a consumer.

    Args:
        folds: its samples.
        spread: from coefficients [k, n] of a regression on merged neurons to those on values, [p, out]; None if each
            neuron has one value.
        intercept: its outputs can get a constant.

    Returns:
        The correction; None if there are no samples.
    """
    parts = [fold for fold in folds if fold.count > 0]
    if not parts:
        return None
    problem = (_Samples if parts[0].samples else _Sums)(parts, spread)
    count = sum(part.count for part in parts)
    before, variance = (sum(getattr(part, name) for part in parts) / count for name in ("energy", "variance"))
    nothing = _Penalties(None, None, False)
    if len(parts) < 2:  # nothing to judge by
        return Fit(*problem.fit((0,), nothing), before, before, variance, str(nothing))
    splits = range(len(parts) if problem.size <= _MOST_SPLITS else 2)
    lost: dict[_Penalties, float] = {}

    def losses(candidates: Iterable[_Penalties], *, roughly: bool) -> dict[_Penalties, float]:
        """The squared errors that are left on folds that were left out."""
        found = dict.fromkeys(candidates, 0.0)
        for split in splits:
            others = tuple(number for number in range(len(parts)) if number != split)
            for one in found:
                found[one] += problem.loss(split, others, one, roughly=roughly)
        return {one: total if math.isfinite(total) else math.inf for one, total in found.items()}

    def judge(candidates: Iterable[_Penalties]) -> _Penalties:
        """The best so far."""
        asked = [one for one in candidates if one not in lost]
        lost.update(losses(asked, roughly=True))
        found = min(lost, key=lost.__getitem__)
        usual = next((one for one in asked if one in usually), found)
        return usual if lost[usual] <= _CLEARLY * lost[found] else found

    tried = (None, *reversed(PENALTIES))
    usually = [_Penalties(USUAL_NEURONS, None, intercept)]
    best = judge([nothing, *([_Penalties(None, None, True)] if intercept else [])])
    if spread is not None:
        best = judge(_Penalties(one, None, intercept) for one in tried if one is not None)
    usually.append(_Penalties(best.neurons, USUAL_VALUES, intercept))
    best = judge(_Penalties(best.neurons, one, intercept) for one in tried if one is not None)
    after = losses([best], roughly=False)[best] / sum(parts[split].count for split in splits)
    weight, constant = problem.fit(tuple(range(len(parts))), best)
    return Fit(weight, constant, before, after, variance, str(best))


class _Sums:
    """Regressions on moments.

    Args:
        parts: the folds, none of them empty.
        spread: as for `fitted`.
    """

    def __init__(self, parts: Sequence[Terms], spread: Spread | None) -> None:
        self._parts, self._spread = parts, spread
        self._latest: dict[str, tuple[object, Any]] = {}
        self.size, outputs = parts[0].errors.covariance.shape
        self._sketch: Tensor | None = None
        if outputs > 2 * _MOST_OUTPUTS:
            signs = torch.randint(2, (outputs, _MOST_OUTPUTS), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
            self._sketch = (signs / _MOST_OUTPUTS**0.5).to(parts[0].errors.covariance)

    def _latest_of(self, name: str, key: object, make: Callable[[], T]) -> T:
        """What was made for this key, if that was the last one asked for: these are large, and made in turn."""
        if name not in self._latest or self._latest[name][0] != key:
            self._latest.pop(name, None)
            self._latest[name] = key, make()
        return self._latest[name][1]

    def _roughly(self, values: Tensor, roughly: bool) -> Tensor:
        """Values [..., out], or as many random combinations of them as are enough to compare penalties."""
        return values @ self._sketch if roughly and self._sketch is not None else values

    def _total(self, name: str, numbers: tuple[int, ...]) -> Moments:
        def make() -> Moments:
            return Moments.total([getattr(self._parts[number], name) for number in numbers])

        return self._latest_of(name, numbers, make)

    def _about(self, name: str, numbers: tuple[int, ...], mean: bool) -> Tensor:
        return self._latest_of(f"{name} about", (numbers, mean), lambda: self._total(name, numbers).about(mean))

    def _by_neurons(self, numbers: tuple[int, ...], penalties: _Penalties) -> Tensor:
        """The coefficients of the regression on merged neurons, [p, out]."""
        assert self._spread is not None, "there are merged neurons"
        assert penalties.neurons is not None, "asked by fit()"
        neurons, missing = (self._about(name, numbers, penalties.constant) for name in ("neurons", "missing"))
        return self._spread(_ridge(neurons, missing, penalties.neurons))

    def fit(self, numbers: tuple[int, ...], penalties: _Penalties, *, roughly: bool = False) -> tuple[Tensor, Tensor]:
        """Coefficients [p, out] and constants [out], fitted to these folds."""
        mean = penalties.constant
        errors = self._latest_of(
            "rough", (numbers, mean, roughly), lambda: self._roughly(self._about("errors", numbers, mean), roughly)
        )
        weight = torch.zeros_like(errors)
        if penalties.neurons is not None:
            key = numbers, penalties.neurons, mean, roughly
            weight = self._latest_of(
                "by neurons", key, lambda: self._roughly(self._by_neurons(numbers, penalties), roughly)
            )
        if penalties.values is not None:
            values = self._about("values", numbers, mean)
            weight = weight + _ridge(values, errors - values @ weight, penalties.values)
        a, b = self._total("errors", numbers).means
        b = self._roughly(b, roughly)
        return weight, (b - a @ weight) if mean else torch.zeros_like(b)

    def loss(self, number: int, others: tuple[int, ...], penalties: _Penalties, *, roughly: bool = False) -> float:
        """The squared errors that are left in a fold by what is fitted to others, summed over samples and outputs."""
        part, (weight, constant) = self._parts[number], self.fit(others, penalties, roughly=roughly)
        values = self._latest_of("left out", number, lambda: part.values.second)
        errors = self._latest_of(
            "left out, errors", (number, roughly), lambda: self._roughly(part.errors.second, roughly)
        )
        means = part.errors.means[0], self._roughly(part.errors.means[1], roughly)
        crossed = 2 * (weight * errors).sum() - (weight * (values @ weight)).sum()
        shifted = 2 * constant @ (means[1] - means[0] @ weight) - constant @ constant
        return part.energy - part.count * float(crossed + shifted)


class _Samples:
    """The same regressions on samples, of which there are fewer than values: in the dual form.

    All that is judged follows from the products of the samples with each other, which are computed once. Of the
    samples their common mean is subtracted first, because it may be much larger than what they differ in.

    Args:
        parts: as for `_Sums`.
        spread: likewise.
    """

    def __init__(self, parts: Sequence[Terms], spread: Spread | None) -> None:
        self._parts, self._spread = parts, spread
        rows = [sample for part in parts for sample in part.samples]
        values, errors, weights = (torch.cat(alike) for alike in zip(*rows, strict=True))
        self._errors, self._weights = errors.double(), weights.double()
        shares = self._weights / self._weights.sum()
        self._mean = shares.to(values.dtype) @ values
        self._values = values - self._mean
        self._along = (self._values @ self._mean).double()  # products with the mean
        self._products = (self._values @ self._values.T).double()
        counts = [sum(len(weights) for _, _, weights in part.samples) for part in parts]
        self._rows = torch.arange(len(values), device=values.device).split(counts)
        self._neurons: tuple[object, Tensor | None] = None, None
        self._gram: tuple[object, Tensor | None] = None, None
        self.size = len(values)

    def _by_neurons(self, numbers: tuple[int, ...], penalties: _Penalties) -> Tensor | None:
        """The coefficients of the regression on merged neurons, [p, out]; None without it."""
        key = numbers, penalties.neurons, penalties.constant
        if penalties.neurons is None:
            return None
        if self._neurons[0] != key:
            assert self._spread is not None, "there are merged neurons"
            chosen = [self._parts[number] for number in numbers]
            neurons, missing = (Moments.total([getattr(t, name) for t in chosen]) for name in ("neurons", "missing"))
            mean = penalties.constant
            self._neurons = key, self._spread(_ridge(neurons.about(mean), missing.about(mean), penalties.neurons))
        return self._neurons[1]

    def _seen(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The samples of some folds, and their shares, which sum to one."""
        rows = torch.cat([self._rows[number] for number in numbers])
        return rows, self._weights[rows] / self._weights[rows].sum()

    def _kernel(self, left: Tensor, seen: Tensor, shares: Tensor, mean: bool) -> Tensor:
        """Products of samples `left` with samples `seen`, about the mean of the latter or as they are."""
        products = self._products[left][:, seen]
        if not mean:
            return products + self._along[left][:, None] + self._along[seen] + self._mean.double().square().sum()
        own = self._products[seen][:, seen] @ shares
        return products - (products @ shares)[:, None] - own + own @ shares

    def _dual(self, numbers: tuple[int, ...], errors: Tensor, penalties: _Penalties) -> Tensor:
        """Coefficients of the samples of some folds, [rows, out]: their weighted sum is the regression on values."""
        assert penalties.values is not None, "asked by the caller"
        seen, shares = self._seen(numbers)
        scale, key = shares.sqrt()[:, None], (numbers, penalties.constant)
        if self._gram[0] != key:
            self._gram = key, self._kernel(seen, seen, shares, penalties.constant).mul_(scale).mul_(scale.T)
        gram = self._gram[1]
        assert gram is not None, "it was just made"
        share = penalties.values / self._values.shape[1] * len(gram)  # of the mean square of a value
        factor, failed = torch.linalg.cholesky_ex(damped(gram, share))
        return scale * torch.cholesky_solve(scale * errors, factor) if not bool(failed) else errors * torch.nan

    def _without_neurons(self, numbers: tuple[int, ...], penalties: _Penalties) -> Tensor:
        """The errors that the regression on merged neurons leaves, [rows, out]."""
        weight = self._by_neurons(numbers, penalties)
        if weight is None:
            return self._errors
        return self._errors - (self._values @ weight.to(self._values.dtype)).double() - self._mean.double() @ weight

    def fit(self, numbers: tuple[int, ...], penalties: _Penalties) -> tuple[Tensor, Tensor]:
        """Coefficients [p, out] and constants [out], fitted to these folds."""
        (seen, shares), weight = self._seen(numbers), self._by_neurons(numbers, penalties)
        errors = self._without_neurons(numbers, penalties)[seen]
        constant = shares @ errors if penalties.constant else torch.zeros_like(errors[0])
        found = torch.zeros(self._values.shape[1], errors.shape[1], dtype=torch.float64, device=errors.device)
        if penalties.values is not None:
            dual, mean = self._dual(numbers, errors - constant, penalties), self._mean.double()
            found = (self._values[seen].T @ dual.to(self._values.dtype)).double() + mean[:, None] * dual.sum(0)
            if penalties.constant:
                constant = constant - (mean + shares @ self._values[seen].double()) @ found
        return found if weight is None else weight + found, constant

    def loss(self, number: int, others: tuple[int, ...], penalties: _Penalties, *, roughly: bool = False) -> float:
        """See `_Sums.loss`; always for all outputs."""
        left, (seen, shares) = self._rows[number], self._seen(others)
        errors = self._without_neurons(others, penalties)
        mean = shares @ errors[seen] if penalties.constant else torch.zeros_like(errors[0])
        found = errors[left] - mean
        if penalties.values is not None:
            dual = self._dual(others, errors[seen] - mean, penalties)
            found = found - self._kernel(left, seen, shares, penalties.constant) @ dual
        return float(found.square().sum(1) @ self._weights[left])


def _ridge(inputs: Tensor, targets: Tensor, share: float) -> Tensor:
    """Ridge regression from moments, as `nac_gpu.calibration.moments.ridge`; not a number if it cannot be solved."""
    if not float(inputs.diagonal().mean()) > 0:
        return torch.zeros_like(targets)
    factor, failed = torch.linalg.cholesky_ex(damped(inputs, share))
    return torch.cholesky_solve(targets, factor) if not bool(failed) else torch.full_like(targets, torch.nan)


def empty_folds() -> list[Terms]:
    """Sums of no samples, for each fold."""
    return [Terms() for _ in range(FOLDS)]
