"""The inputs on which neurons are observed: calibration data, or synthetic inputs made from the model."""

from dataclasses import dataclass

from torch import Tensor, nn

from nac_gpu.calibration.batches import Batches, Calibration, as_batches
from nac_gpu.calibration.dream import dream, has_statistics, why_not
from nac_gpu.calibration.tokens import Speaker
from nac_gpu.distributed.consistency import check_arguments, union
from nac_gpu.distributed.ranks import ALONE, Ranks
from nac_gpu.network.running import ExampleInputs, device_of
from nac_gpu.network.state import is_open


@dataclass(frozen=True)
class Inputs:
    """Inputs on which neurons are observed.

    Attributes:
        batches: the inputs; empty if neurons are compared by their weights.
        source: where they come from, or why there are none; printed with the plan.
        comparable: the inputs are good enough to compare neurons by their activations, not only for compensation.
        synthetic: the inputs are synthetic.
    """

    batches: Batches
    source: str
    comparable: bool = True
    synthetic: bool = False


def inputs_for(
    calibration: Calibration,
    model: nn.Module,
    example_inputs: ExampleInputs,
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> Inputs:
    """The inputs that `calibration=` asks for.

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
        if calibration == "none":
            return _weights_only("calibration='none'")
        return _synthetic(model, example_inputs, seed, ranks)
    if is_open(model):
        raise ValueError(
            "got calibration data for a model of nac_gpu.open_model, expected calibration='none': its weights are in "
            "files, so its neurons are compared by their weights"
        )
    batches = union(list(as_batches(calibration, example_inputs, device_of(model))), ranks)
    return Inputs(batches, "of calibration data")


def _weights_only(reason: str) -> Inputs:
    return Inputs((), f"neurons are compared by their weights, without compensation: {reason}")


def _synthetic(model: nn.Module, example_inputs: ExampleInputs, seed: int, ranks: Ranks) -> Inputs:
    if is_open(model):
        return _weights_only("its weights are in files")
    reason = why_not(model, example_inputs)
    if reason is None:
        assert isinstance(example_inputs, Tensor), "why_not() checks this"
        remembered = has_statistics(model)
        source = f"dreamed up from {'the statistics of BatchNorm' if remembered else 'the weights of the first layer'}"
        return Inputs([*dream(model, example_inputs, seed=seed, ranks=ranks)], source, remembered, True)
    speaker = Speaker(model, example_inputs)
    if not speaker.places:
        return _weights_only(reason)
    speaks = speaker.speaks()
    source = "of tokens that the model itself says" if speaks else "of random tokens"
    return Inputs(speaker.batches(seed, ranks), source, speaks, True)
