"""The trial: before a plan is returned, the copies test checks on the example inputs that each group can be merged.

All groups are merged at once, with the code and by the rule that will merge them. Where that fails, the layers tell
which group is the cause; it is left alone, and the others are tried again. So each failing group costs few passes: only
the groups around the layer where the smaller network differs first are suspected, and a suspect is the cause if the
network gets further without it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from torch import nn

from nac_gpu.merging.attributes import Following, guesses, not_configured, stale
from nac_gpu.merging.centroids import Deviation
from nac_gpu.network.memory import trim
from nac_gpu.network.probes import probes
from nac_gpu.network.running import ExampleInputs
from nac_gpu.planning.bench import Bench, Failure, Measured, suspects
from nac_gpu.tracing.graph import Choice, LeftAlone

_SUSPECTS = 6  # groups that are tried as the cause of a failure; if it is none of them, all groups are
Failed = list[tuple[Choice, str]]  # choices that fail, and why


@dataclass(frozen=True)
class Outcome:
    """The result of a trial.

    Attributes:
        choices: the groups that can be merged, all together, with the attributes that have to follow them. Units
            (heads, groups) that cannot be merged are replaced by their channels.
        measured: the network of these choices; None if no group can be merged.
        refused: groups that cannot be merged, and why.
        lines: for the printed plan, on what could not be brought up to date.
    """

    choices: tuple[Choice, ...]
    measured: Measured | None
    refused: tuple[LeftAlone, ...] = ()
    lines: tuple[str, ...] = ()


class Trial:
    """Tests groups on the example inputs, and caches the results.

    Args:
        model: not changed, and not run.
        example_inputs: as for `record`. Constant inputs and parameters are replaced by random ones, because they would
            hide errors.
        larger: other inputs on which the groups are tested, too, such as longer ones; None for no others.
        deviation: of the rule that will merge the groups, see `nac_gpu.merging.centroids.Merger`.
        auxiliary: also compare the outputs of auxiliary heads.
        seed: of the choice of copies.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs,
        *,
        larger: ExampleInputs | None = None,
        deviation: Deviation = "restored",
        auxiliary: bool = False,
        seed: int = 0,
    ) -> None:
        self._outcomes: dict[tuple[Any, ...], Outcome] = {}
        self._modules = dict(model.named_modules())
        self._searches = [
            _Search(model, inputs, deviation, auxiliary=auxiliary, seed=seed)
            for inputs in (larger, example_inputs)
            if inputs is not None
        ]

    @property
    def attempts(self) -> int:
        """How many times smaller networks were run."""
        return sum(search.attempts for search in self._searches)

    def run(self, choices: Sequence[Choice]) -> Outcome:
        """Find out which of these groups can be merged to these widths, and the cost of the network of all of them."""
        asked = tuple((choice.group.name, choice.group.size, choice.width) for choice in choices)
        if asked not in self._outcomes:
            self._outcomes[asked] = self._outcome(choices)
        return self._outcomes[asked]

    def _outcome(self, choices: Sequence[Choice]) -> Outcome:
        place = {
            group.name: at for at, choice in enumerate(choices) for group in (*choice.group.otherwise, choice.group)
        }
        good = [choice if choice.group.attributes else _guessed(self._modules, choice) for choice in choices]
        refused: list[LeftAlone] = []
        measured: Measured | None = None
        for search in self._searches:
            good, measured = self._settled(search, good, refused)
        good.sort(key=lambda choice: place[choice.group.name])
        lines = stale(self._modules[""], good)
        if lines and measured is not None:  # numbers that nothing reads in eval mode may matter in training
            good, measured, why = self._searches[-1].trained(good, measured)
            lines = stale(self._modules[""], good) + why
        for search in self._searches:
            search.release()
        trim()
        return Outcome(tuple(good), measured, tuple(refused), tuple(lines))

    def _settled(
        self, search: "_Search", choices: list[Choice], refused: list[LeftAlone]
    ) -> tuple[list[Choice], Measured | None]:
        """The choices that pass together, and the cost of their network; the others are added to `refused`."""
        good, failed, measured = search.run(choices)
        if not failed:
            return good, measured
        rest = [
            _guessed(self._modules, Choice(other, max(1, round(choice.width / choice.group.size * other.size))))
            for choice, _ in failed
            for other in choice.group.otherwise
        ]
        if rest:
            good, measured = self._settled(search, good + rest, refused)
        kept = {choice.group.name for choice in good}
        for choice, why in failed:
            group = choice.group
            if not any(other.name in kept for other in group.otherwise):
                refused.append(LeftAlone(group.name, group.size, why))
        return good, measured


class _Search:
    """Searches on one set of inputs: in float32 first, and from the first doubt on in float64.

    Attributes:
        attempts: how many times smaller networks were run.

    Args:
        model: not changed, and not run.
        inputs: its inputs.
        deviation: as for `Merger`.
        auxiliary: also compare the outputs of auxiliary heads.
        seed: of the choice of copies.
    """

    def __init__(
        self, model: nn.Module, inputs: ExampleInputs, deviation: Deviation, *, auxiliary: bool, seed: int
    ) -> None:
        self._modules = dict(model.named_modules())
        self._auxiliary, self._seed = auxiliary, seed
        self._deviation: Deviation = deviation
        self._stricter = probes(model, inputs, seed)
        self._probe = next(self._stricter)
        self._read: frozenset[tuple[str, str]] | None = None
        self._hopeless: set[str] = set()  # kinds of groups that no guess of attributes mended
        self._were: set[tuple[Any, ...]] = set()  # what failed, so that no search goes round in circles
        self.attempts = 0

    def run(self, choices: Sequence[Choice]) -> tuple[list[Choice], Failed, Measured | None]:
        """The choices that pass together, those that fail and why, and the network of those that pass."""
        active, failed = list(choices), []
        self._hopeless.clear()
        self._were.clear()
        self._bench = self._benched(choices)
        found: Measured | Failure | None = None
        guessed = False
        while active:
            if found is None:
                found = self._attempt(active)
            if isinstance(found, Measured):
                return active, failed, found
            if not found.raised and self._next_probe():
                self._bench, found = self._benched(choices), None
            elif found.place is None and not self._bench.watching:  # the outputs differ: the layers tell where
                self._bench.watch()
                found = None
            elif not guessed:
                guessed = True
                others = self._second(active, found.place)
                then = self._attempt(others) if others != active else found  # several groups may need one attribute
                active, found = (others, then) if isinstance(then, Measured) else (active, found)
            else:
                self._were.add(_key(active))
                active, found = self._without_cause(active, found, failed)
        return [], failed, None

    def release(self) -> None:
        """Free the networks of the latest run: they take the memory of several models."""
        vars(self).pop("_bench", None)

    def trained(self, choices: list[Choice], measured: Measured) -> tuple[list[Choice], Measured, list[str]]:
        """Attributes with which the smaller network runs in training mode, too, if it does not already.

        Returns:
            The choices with these attributes, and their network; and a line that says why there are none.
        """
        why = self._bench.trains(choices)
        if why is None:
            return choices, measured, []
        others = self._second(choices)
        found = self._attempt(others)
        if isinstance(found, Measured) and self._bench.trains(others) is None:
            return others, found, []
        return choices, measured, [f"the smaller network does not run in training mode: {why}"]

    def _ways(self, choice: Choice, place: str | None = None) -> Iterator[Choice]:
        """The choice with the attributes of every guess but its own; then with configurations as they are.

        Args:
            choice: the choice.
            place: the module that fails with it.
        """
        for found in guesses(self._modules, choice.group, self._reads, place):
            if found != choice.group.attributes:
                yield _with(choice, found)
        other = not_configured(self._modules, choice)
        if other is not None:
            yield other

    def _second(self, choices: Sequence[Choice], place: str | None = None) -> list[Choice]:
        """The choices, each with the attributes of its next guess if there is one; `place` as for `_ways`."""
        return [next(self._ways(choice, place), choice) for choice in choices]

    def _reads(self) -> frozenset[tuple[str, str]]:
        if self._read is None:
            self._read = self._bench.reads()
        return self._read

    def _attempt(self, choices: Sequence[Choice]) -> Measured | Failure:
        self.attempts += 1
        return self._bench.attempt(choices)

    def _next_probe(self) -> bool:
        """Go on with a stricter probe, if there is one in which the model runs.

        Difference in float32 may be rounding, so that only a stricter probe tells; all later searches use it, too.
        """
        if not self._probe.rounds:
            return False
        following = next(self._stricter, None)
        self._probe = following or self._probe
        return following is not None

    def _benched(self, choices: Sequence[Choice]) -> Bench:
        """The network of copies, in the first dtypes in which it runs."""
        while True:
            try:
                return Bench(self._probe, choices, self._deviation, auxiliary=self._auxiliary, seed=self._seed)
            except Exception:  # an operation that does not support this dtype
                following = next(self._stricter, None)
                if following is None:
                    raise
                self._probe = following

    def _without_cause(
        self, active: list[Choice], found: Failure, failed: Failed
    ) -> tuple[list[Choice], Measured | Failure | None]:
        """The choices without the cause of a failure, or with attributes that mend it; and what these choices give."""
        for suspect in suspects(active, found)[:_SUSPECTS]:
            rest = [choice for choice in active if choice is not suspect]
            then = self._attempt(rest) if rest else None
            if then is not None and not found.moved(then):
                continue
            kind = _kind(self._modules, suspect)
            for number, other in enumerate(self._ways(suspect, found.place) if kind not in self._hopeless else ()):
                mended = [other if choice is suspect else choice for choice in active]
                if _key(mended) in self._were:
                    continue
                after = self._attempt(mended)
                if found.moved(after):
                    return self._alike(mended, suspect, number, after, found.place)
            failed.append((suspect, found.reason))
            if kind not in self._hopeless or not suspect.group.units:
                self._hopeless.add(kind)
                return rest, then
            # Two groups of units of one kind failed whatever the attributes: so will the others.
            alike = [bool(c.group.units) and _kind(self._modules, c) == kind for c in rest]
            failed += [(choice, found.reason) for choice, same in zip(rest, alike, strict=True) if same]
            rest = [choice for choice, same in zip(rest, alike, strict=True) if not same]
            return rest, None if any(alike) else then
        return self._halved(active, failed), None

    def _alike(
        self, active: list[Choice], suspect: Choice, number: int, after: Measured | Failure, place: str | None
    ) -> tuple[list[Choice], Measured | Failure]:
        """Try what mended one group for all groups in modules of the same classes."""
        if isinstance(after, Measured):
            return active, after
        kind = _kind(self._modules, suspect)
        same = []
        for choice in active:
            others = self._ways(choice, place) if _kind(self._modules, choice) == kind else iter(())
            same.append(next(islice(others, number, None), choice))
        then = self._attempt(same) if _key(same) not in self._were else after
        return (same, then) if after.moved(then) else (active, after)

    def _halved(self, active: list[Choice], failed: Failed) -> list[Choice]:
        """The choices that pass by themselves, found by halving; none if all do, but not together."""
        lost: Failed = []

        def passing(part: list[Choice]) -> list[Choice]:
            found = self._attempt(part)
            if isinstance(found, Measured):
                return part
            if len(part) > 1:
                return passing(part[: len(part) // 2]) + passing(part[len(part) // 2 :])
            for other in self._ways(part[0]):
                if isinstance(self._attempt([other]), Measured):
                    return [other]
            lost.append((part[0], found.reason))
            return []

        good = passing(active) if len(active) > 1 else []
        if not lost and good == active:
            found = self._attempt(active)
            reason = found.reason if isinstance(found, Failure) else "it was not the same twice"
            lost, good = [(choice, f"together with the other groups: {reason}") for choice in active], []
        failed += lost
        return good


def _guessed(modules: Mapping[str, nn.Module], choice: Choice) -> Choice:
    """The choice with the attributes that most likely follow its size."""
    return _with(choice, next(guesses(modules, choice.group)))


def _with(choice: Choice, attributes: tuple[Following, ...]) -> Choice:
    return replace(choice, group=replace(choice.group, attributes=attributes))


def _key(choices: Sequence[Choice]) -> tuple[Any, ...]:
    """The same for choices of the same groups with the same attributes."""
    return tuple((c.group.name, c.group.attributes, c.group.configured) for c in choices)


def _kind(modules: Mapping[str, nn.Module], choice: Choice) -> str:
    """A key for groups that are expected to need the same attributes: the classes of their modules."""
    names = choice.group.units or tuple(layer.rpartition(".")[0] for layer in choice.group.layers)
    return " ".join(sorted({type(modules.get(name, modules[""])).__qualname__ for name in names}))
