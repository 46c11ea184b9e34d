"""The inputs on which neurons are observed: calibration data, or synthetic inputs made from the model."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from nac_gpu.calibration.batches import Batches, Calibration, as_batches
from nac_gpu.calibration.dream import BATCH, draw, dream, has_statistics, why_not
from nac_gpu.calibration.tokens import Speaker
from nac_gpu.distributed.consistency import check_arguments, union
from nac_gpu.distributed.fallbacks import StepError, attempt
from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.network.copying import converted, is_narrow
from nac_gpu.network.running import ExampleInputs, call, device_of, evaluating
from nac_gpu.network.state import is_open

_IN_FLOAT32 = ", in float32"


@dataclass(frozen=True)
class Inputs:
    """Inputs on which neurons are observed.

    Attributes:
        batches: the inputs; empty if neurons are compared by their weights.
        source: where they come from, or why there are none; printed with the plan.
        comparable: the inputs are good enough to compare neurons by their activations, not only for compensation.
        synthetic: the inputs are synthetic.
        float32: they are for a copy of the model in float32.
    """

    batches: Batches
    source: str
    comparable: bool = True
    synthetic: bool = False
    float32: bool = False


@dataclass(frozen=True)
class Way:
    """A way to inputs.

    Attributes:
        make: makes the inputs, with the ranks among which it may divide its work.
        step: what it does, for the line that says that it failed and that the next way was taken; empty if there is no
            other way than this.
    """

    make: Callable[[Ranks], Inputs]
    step: str = ""


def ways(
    calibration: Calibration,
    model: nn.Module,
    example_inputs: ExampleInputs,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> Iterator[Way]:
    """The ways to the inputs that `calibration=` asks for, the best first.

    Args:
        calibration: batches of inputs; `"dream"` for synthetic inputs where the model allows it (see
            `nac_gpu.calibration.dream` and `nac_gpu.calibration.tokens`); `"none"` to use the weights alone.
        model: not changed.
        example_inputs: what it is called with.
        seed: of synthetic inputs.
        ranks: the processes that work together; each may hold its own part of the calibration data.

    Raises:
        TypeError: calibration data of a wrong type.
        ValueError: empty calibration data, an unknown word, or data for a model whose weights are in files.
        RankError: another rank failed or was lost.
    """
    check_arguments(ranks, {"calibration": calibration if isinstance(calibration, str) else "batches"})
    if isinstance(calibration, str):
        if calibration not in ("dream", "none"):
            raise ValueError(f"calibration={calibration!r}, expected batches of inputs, 'dream' or 'none'")
        if calibration == "dream":
            yield from _synthetic(model, example_inputs, seed, ranks)
        yield _weights_only("calibration='none'" if calibration == "none" else None)
        return
    if is_open(model):
        raise ValueError(
            "got calibration data for a model of nac_gpu.open_model, expected calibration='none': its weights are in "
            "files, so its neurons are compared by their weights"
        )
    batches = union(list(as_batches(calibration, example_inputs, device_of(model))), ranks)
    yield Way(lambda _: Inputs(batches, "of calibration data"))


def _weights_only(reason: str | None) -> Way:
    source = "neurons are compared by their weights, without compensation"
    return Way(lambda _: Inputs((), source if reason is None else f"{source}: {reason}"))


def _synthetic(model: nn.Module, example_inputs: ExampleInputs, seed: int, ranks: Ranks) -> Iterator[Way]:
    """The usual ways to synthetic inputs, each followed by a careful one."""
    if is_open(model):
        yield _weights_only("its weights are in files")
        return
    try:
        reason = attempt(lambda _: why_not(model, example_inputs), ranks)
    except StepError as error:
        reason = str(error)
    if reason is not None:
        for careful in (False, True):
            yield Way(partial(_spoken, model, example_inputs, seed, reason, careful), "making tokens")
        return
    assert isinstance(example_inputs, Tensor), "why_not() checks this"
    if not has_statistics(model):
        yield Way(partial(_dreamed, model, example_inputs, seed, "draw", False), "dreaming")
        yield Way(partial(_dreamed, model, example_inputs, seed, "draw", True), "dreaming")
        return
    yield Way(partial(_dreamed, model, example_inputs, seed, "dream", False), "dreaming")
    yield Way(partial(_dreamed, model, example_inputs, seed, "dream", True), "dreaming")
    yield Way(partial(_dreamed, model, example_inputs, seed, "noise", True), "scaling noise")
    # Where BatchNorm is run, draws are worse than nothing: they have neither its means nor its deviations.
    yield Way(partial(_dreamed, model, example_inputs, seed, "draw", True), "drawing")


_SOURCES = {
    "dream": "dreamed up from the statistics of BatchNorm",
    "noise": "of noise, scaled to fit the statistics of BatchNorm",
    "draw": "drawn from the weights of the first layer, and of noise",
}


def _dreamed(model: nn.Module, example_inputs: Tensor, seed: int, kind: str, careful: bool, ranks: Ranks) -> Inputs:
    """Synthetic images or vectors of one of these kinds."""
    run, example, float32 = _differentiable(model, example_inputs, ranks) if careful else (model, example_inputs, False)
    assert isinstance(example, Tensor), "as the original is"
    size = _batch_size(run, example, ranks) if careful else None
    if kind == "draw" and has_statistics(model):
        batches = draw(run, example, seed=seed, careful=size)
    else:
        steps = 0 if kind == "noise" else None  # without statistics, it draws
        batches = dream(run, example, seed=seed, ranks=ranks, careful=size, steps=steps)
    return Inputs(
        [*batches], _SOURCES[kind] + _IN_FLOAT32 * float32, kind == "dream" or not has_statistics(model), True, float32
    )


def _spoken(
    model: nn.Module, example_inputs: ExampleInputs, seed: int, reason: str, careful: bool, ranks: Ranks
) -> Inputs:
    """Synthetic tokens; no inputs, for that reason, if the model reads none."""
    run, example, float32 = _differentiable(model, example_inputs, ranks) if careful else (model, example_inputs, False)
    speaker = Speaker(run, example, careful=careful)
    if not speaker.places:
        return _weights_only(reason).make(ranks)
    speaks = speaker.speaks()
    source = "of tokens that the model itself says" if speaks else "of random tokens"
    return Inputs(speaker.batches(seed, ranks), source + _IN_FLOAT32 * float32, speaks, True, float32)


def _differentiable(
    model: nn.Module, example_inputs: ExampleInputs, ranks: Ranks
) -> tuple[nn.Module, ExampleInputs, bool]:
    """What gradients need: float32 in place of types of 16 bits, if the code runs in it, and no inference tensors.

    Returns:
        A copy, or the model itself; the inputs for it; whether it is in float32 in place of the model's own type.
    """
    narrow = is_narrow(model)
    if not narrow and not any(parameter.is_inference() for parameter in model.parameters()):
        return model, example_inputs, False

    def run(_: Ranks) -> tuple[nn.Module, ExampleInputs]:
        if not narrow:
            return copy.deepcopy(model), example_inputs
        wide, inputs = converted(model, example_inputs, torch.float32)
        with evaluating(wide):
            call(wide, inputs)
        return wide, inputs

    try:
        return *attempt(run, ranks), narrow
    except StepError:
        return model, example_inputs, False


def _batch_size(model: nn.Module, example: Tensor, ranks: Ranks) -> int:
    """The usual batch size of dreams, or that of the example if the model accepts no other."""

    def run(_: Ranks) -> None:
        with evaluating(model):
            call(model, example[torch.arange(BATCH, device=example.device) % len(example)])

    try:
        attempt(run, ranks)
    except StepError:
        return len(example)
    return BATCH
