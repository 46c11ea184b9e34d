"""Gathering evidence: choose the inputs, then observe the neurons on them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from nac_gpu.calibration.activations import NotFiniteError, observe
from nac_gpu.calibration.batches import Batches, Calibration, Divided, divided, of_tokens, parts_of
from nac_gpu.calibration.evidence import Evidence
from nac_gpu.calibration.inputs import Inputs, Way, ways
from nac_gpu.calibration.readings import readings
from nac_gpu.distributed.fallbacks import StepError, attempt
from nac_gpu.distributed.ranks import ALONE, RankError, Ranks
from nac_gpu.network.copying import copied, in_float32
from nac_gpu.network.running import ExampleInputs, call, evaluating, without_cache
from nac_gpu.network.state import tensors
from nac_gpu.tracing.graph import Group

_TOKENS = 2048  # of a batch


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
        calibration: as for `nac_gpu.calibration.inputs.ways`. If a way fails that the model was to provide, the next is
            taken, and the evidence says so.
        seed: of synthetic inputs.
        ranks: the processes that work together; each may hold its own part of the calibration data.

    Raises:
        TypeError: calibration data of a wrong type.
        ValueError: empty calibration data, activations that are not finite, or an unknown `calibration`.
        RuntimeError: the forward pass fails on the calibration data.
        RankError: another rank failed or was lost.
    """
    failed: dict[str, str] = {}  # steps, and why they failed
    way = Way(lambda _: Inputs((), ""))
    for way in ways(calibration, copied(model), example_inputs, seed, ranks):
        if not way.step:
            break
        try:
            found = attempt(lambda ranks, way=way: _observed(model, groups, way.make(ranks), ranks), ranks)
        except StepError as error:
            failed[way.step] = str(error)
        else:
            failed.pop(way.step, None)  # at the second attempt, say
            return _because(found, failed)
    inputs = way.make(ranks)
    try:
        return _because(_observed(model, groups, inputs, ranks), failed)
    except RankError:
        raise
    except NotFiniteError as error:
        why = "on the calibration data, expected finite ones; check the calibration inputs"
        raise ValueError(f"{error} {why}") from error
    except Exception as error:
        raise RuntimeError(f"the forward pass fails on the calibration data: {error}") from error


def _because(evidence: Evidence, failed: Mapping[str, str]) -> Evidence:
    """Evidence that is the next best after some steps failed, of which it tells the first."""
    if not failed:
        return evidence
    step, why = next(iter(failed.items()))
    source = f"{evidence.source}, because {step} failed ({why})"
    return replace(evidence, source=source, failures=(source,))


def _observed(model: nn.Module, groups: Sequence[Group], inputs: Inputs, ranks: Ranks) -> Evidence:
    """What is seen on the inputs; the weights alone if there are none."""
    state = tensors(model)
    if not inputs.batches:
        return Evidence(state, source=inputs.source)
    network = in_float32(model) if inputs.float32 else copied(model)
    batches, judged = _divided(network, [without_cache(network, batch) for batch in inputs.batches], ranks)
    activities = observe(network, state, groups, batches, ranks)
    return Evidence(
        state,
        batches,
        judged,
        activities,
        _described(model, groups, inputs.batches, inputs.source),
        inputs.comparable,
        inputs.synthetic,
        inputs.float32,
    )


def _divided(network: nn.Module, batches: Batches, ranks: Ranks) -> Divided:
    """Inputs to fit to and inputs to judge by, if the network takes batches of these sizes; else all, and none.

    Large batches of tokens become smaller ones: the logits of many tokens take more memory than all else.
    """
    smaller = [part for batch in batches for part in parts_of(batch, _TOKENS)] if of_tokens(batches) else batches
    found = divided(smaller)

    def run(_: Ranks) -> None:
        if len(found.fit) == len(batches) or len(smaller) > len(batches):  # batches were divided
            with evaluating(network):
                for part in (found.fit[0], found.judged[0]):
                    call(network, part)

    try:
        if found.judged:
            attempt(run, ranks)
    except StepError:
        return Divided(batches)
    return found


def _described(model: nn.Module, groups: Sequence[Group], batches: Batches, source: str) -> str:
    """One line that names the inputs, and the tensors whose consumers cannot be compensated."""
    count = sum(len(batch) if isinstance(batch, Tensor) else 1 for batch in batches)
    unit = "inputs" if all(isinstance(batch, Tensor) for batch in batches) else "batches"
    line = f"activations: {count} {unit} {source}"
    compensated = {reading.member.tensor for group in groups for reading in readings(model, group)}
    readers = dict.fromkeys(m.tensor for group in groups for m in group.members if m.role == "sum")
    others = [tensor for tensor in readers if tensor not in compensated]
    return line + (f"; what these read is not compensated: {', '.join(others)}" if others else "")
