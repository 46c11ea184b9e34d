"""Gathering evidence: choose the inputs, then observe the neurons on them."""

from collections.abc import Sequence

from torch import Tensor, nn

from nac_gpu.calibration.activations import observe
from nac_gpu.calibration.batches import Batches, Calibration
from nac_gpu.calibration.evidence import Evidence
from nac_gpu.calibration.inputs import inputs_for
from nac_gpu.calibration.readings import readings
from nac_gpu.distributed.ranks import ALONE, RankError, Ranks
from nac_gpu.network.copying import copied
from nac_gpu.network.running import ExampleInputs
from nac_gpu.network.state import tensors
from nac_gpu.tracing.graph import Group


def gather(
    model: nn.Module,
    example_inputs: ExampleInputs,
    groups: Sequence[Group],
    calibration: Calibration,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> Evidence:
    """Gather evidence about the neurons of these groups.

    Args:
        model: not changed, and not run: a copy is.
        example_inputs: what it is called with.
        groups: the groups.
        calibration: as for `nac_gpu.calibration.inputs.inputs_for`.
        seed: of synthetic inputs.
        ranks: the processes that work together; each may hold its own part of the calibration data.

    Raises:
        TypeError: calibration data of a wrong type.
        ValueError: empty calibration data, activations that are not finite, or an unknown `calibration`.
        RuntimeError: the forward pass fails on the calibration data.
        RankError: another rank failed or was lost.
    """
    state, run = tensors(model), copied(model)
    inputs = inputs_for(calibration, run, example_inputs, seed, ranks)
    if not inputs.batches:
        return Evidence(state, source=inputs.source)
    try:
        activities = observe(run, state, groups, inputs.batches, ranks)
    except RankError:
        raise
    except (RuntimeError, TypeError) as error:
        raise RuntimeError(f"the forward pass fails on the calibration data: {error}") from error
    line = _described(model, groups, inputs.batches, inputs.source)
    return Evidence(state, inputs.batches, activities, line, inputs.comparable, inputs.synthetic)


def _described(model: nn.Module, groups: Sequence[Group], batches: Batches, source: str) -> str:
    """One line that names the inputs, and the tensors whose consumers cannot be compensated."""
    count = sum(len(batch) if isinstance(batch, Tensor) else 1 for batch in batches)
    unit = "inputs" if all(isinstance(batch, Tensor) for batch in batches) else "batches"
    line = f"activations: {count} {unit} {source}"
    compensated = {reading.member.tensor for group in groups for reading in readings(model, group)}
    readers = dict.fromkeys(m.tensor for group in groups for m in group.members if m.role == "sum")
    others = [tensor for tensor in readers if tensor not in compensated]
    return line + (f"; what these read is not compensated: {', '.join(others)}" if others else "")
