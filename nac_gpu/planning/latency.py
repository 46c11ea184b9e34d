"""Latency budgets. The time of a forward pass cannot be computed from the widths, so candidate networks are timed.

A search finds the share of FLOPs whose network meets the latency budget. For each guess, widths are chosen as for a
FLOPs budget (see `nac_gpu.planning.budget`). A network of these widths is then built and timed in turn with the model,
on its device, in eval mode, on the example inputs. Its weights do not matter for the time, so nothing is merged yet.
"""

from collections.abc import Callable, Sequence

from torch import nn

from nac_gpu.distributed.ranks import Ranks
from nac_gpu.merging.attributes import attributes
from nac_gpu.merging.centroids import merged
from nac_gpu.merging.copies import random_assignments
from nac_gpu.network.copying import copied, rebuild
from nac_gpu.network.running import ExampleInputs, device_of
from nac_gpu.network.state import tensors
from nac_gpu.network.timing import seconds_in_turn, spread
from nac_gpu.tracing.graph import Choice

_SECONDS = 2.0  # of timing for each guess
_GUESSES = 8
_TOLERANCE = 0.03  # share of the budget that may stay unused
_CLOSE = 0.01  # the search ends when its bounds differ by less, as shares of FLOPs


class Stopwatch:
    """Times smaller networks in turn with the original.

    Args:
        model: the original; not changed.
        example_inputs: what it is called with.
        ranks: the processes that work together; rank 0 measures for all.
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs, ranks: Ranks) -> None:
        self._model, self._inputs, self._ranks = model, example_inputs, ranks
        self._state = tensors(model)

    def measure(self, choices: Sequence[Choice]) -> tuple[float, str]:
        """The latency of a network of these widths relative to the model's, and a line for the printed plan."""
        return self._ranks.sent(self._measured(choices) if self._ranks.rank == 0 else (0.0, ""))

    def _measured(self, choices: Sequence[Choice]) -> tuple[float, str]:
        state = merged(self._state, choices, random_assignments(choices, 0))
        small = rebuild(self._model, state, attributes(self._model, choices))
        before, after = seconds_in_turn(copied(self._model), small, self._inputs, _SECONDS)
        share = spread(after / before).median
        old, new = (f"{1000 * spread(seconds).median:.3g} ms" for seconds in (before, after))
        where = f"on {device_of(self._model).type}, median of {len(before)} passes in turn"
        return share, f"latency on the example inputs: {old} -> {new} ({100 * share:.1f} %), measured {where}"


def nearest(wanted: float, least: float, timed: Callable[[float], float]) -> float:
    """Search for the largest share of FLOPs whose relative latency is at most `wanted`.

    Args:
        wanted: relative latency, less than 1.
        least: the smallest possible share of FLOPs.
        timed: measures the relative latency at a share of FLOPs.

    Returns:
        The last share tried that met the budget.

    Raises:
        ValueError: even the smallest network takes longer.
    """
    slow, quick = (1.0, 1.0), None  # bounds: (share of FLOPs, relative latency)
    share, found = max(wanted, least), 1.0
    aim = (1 - _TOLERANCE / 2) * wanted
    for guess in range(1, _GUESSES + 1):
        if quick is None and guess == _GUESSES:
            share = least
        found = timed(share)
        if found <= wanted:
            quick = share, found
            if found >= (1 - _TOLERANCE) * wanted or slow[0] - share < _CLOSE:
                break
        elif share <= least:
            break
        else:
            slow = share, found
        if quick is None:
            slope = max((1 - found) / (1 - share), 1e-6)  # secant step; a part of the time is constant
            share = max(min(max(share - (found - aim) / slope, 0.3 * share), 0.97 * share), least)
        else:
            if slow[0] - quick[0] < _CLOSE:
                break
            part = (aim - quick[1]) / max(slow[1] - quick[1], 1e-6)
            share = quick[0] + min(max(part, 0.1), 0.9) * (slow[0] - quick[0])
    if quick is None:
        raise ValueError(
            f"latency={wanted!r} cannot be met: with {100 * share:.1f} % of its operations a pass still takes "
            f"{100 * found:.0f} % of the time; larger batches in the example inputs leave more to save"
        )
    return quick[0]
