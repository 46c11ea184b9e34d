"""What is measured of one model of the zoo: by this library, and by Torch-Pruning."""

import resource
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import nac_gpu as nac
from common.checks import compressible_share, training_step
from common.zoo_models import Case
from nac_gpu.planning.prepare import plan_for
from nac_gpu.planning.request import Request
from nac_gpu.planning.taking import take
from nac_gpu.testing import floating_outputs, merge_copies, randomise

Row = dict[str, Any]
WIDTH = 0.5


def memory() -> int:
    """The most memory that this process ever held, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1 if sys.platform != "darwin" else 1024) // 1024


def said(error: BaseException) -> str:
    """An error in one line: its type, what it says, and the last place in the stack."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:400]
    return f"{type(error).__name__}: {text} ({place.name}, line {place.lineno})"


def built(case: Case) -> tuple[nn.Module, Any]:
    """The model in eval mode with random weights, and its inputs."""
    torch.manual_seed(0)
    return randomise(case.build()).eval(), case.inputs()


def started(note: Callable[[Row], None]) -> tuple[Row, Callable[..., None]]:
    """A new row, and what notes the stage that it has reached with all that is known by then."""
    row: Row = {"stage": "building"}

    def reached(stage: str, **known: Any) -> None:
        row.update(known, stage=stage, memory=memory(), processor_seconds=time.process_time())
        note(row)

    return row, reached


def compression(case: Case, note: Callable[[Row], None], *, compensate: bool = False) -> None:
    """Plan, identity and a network of half the width.

    Args:
        case: the model.
        note: takes what is known so far, after every stage.
        compensate: refit and refine that network on the example inputs, too.
    """
    row, reached = started(note)
    try:
        model, inputs = built(case)
        reached("planning", parameters=sum(p.numel() for p in model.parameters()))
        start = time.perf_counter()
        try:
            prepared = plan_for(take(model, inputs), Request(width=WIDTH))  # what nac.plan does
        except ValueError as error:
            if not str(error).startswith("nothing to compress"):
                raise
            reached(
                "done",
                seconds=time.perf_counter() - start,
                groups=0,
                share=0.0,
                left_alone=[["", 0, str(error)[:2000]]],
            )
            return
        reached(
            "identity",
            seconds=time.perf_counter() - start,
            groups=len(prepared.groups),
            share=compressible_share(prepared.model, prepared.groups),
            left_alone=[[alone.layer, alone.size, alone.reason] for alone in prepared.plan.left_alone],
        )
        found = merge_copies(prepared.model, inputs, prepared.choices)
        reached("compressing", identity=found.error, effect=found.effect, vacuous=found.vacuous)
        calibration = [inputs] if compensate else "none"
        small = nac.compress(model, inputs, width=WIDTH, method="random", calibration=calibration, refine=2)
        after = sum(p.numel() for p in small.parameters())
        reached("training", after=after)
        if prepared.plan.after.parameters != after:
            raise ValueError(f"the plan promised {prepared.plan.after.parameters} parameters, and {after} came out")
        del model, prepared
        training_step(small, inputs)
        if case.afterwards is not None:
            reached("generating")
            case.afterwards(small)
        reached("done")
    except Exception as error:  # whatever goes wrong is what the zoo is there to find
        reached(row["stage"], error=said(error))


def last_layer(model: nn.Module) -> list[nn.Module]:
    """The last Linear, or where there is none the last convolution."""
    for kind in (nn.Linear, nn.modules.conv._ConvNd):
        found: list[nn.Module] = [module for module in model.modules() if isinstance(module, kind)]
        if found:
            return found[-1:]
    return []


def heads_of(model: nn.Module) -> dict[nn.Module, int]:
    """Numbers of heads by the layers that make queries, keys and values, as Torch-Pruning asks for them."""
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        layer = module if isinstance(module, nn.MultiheadAttention) else getattr(module, "qkv", None)  # timm's
        heads = getattr(module, "num_heads", None)
        if isinstance(layer, nn.Linear | nn.MultiheadAttention) and isinstance(heads, int):
            found[layer] = heads
    return found


def pruned(model: nn.Module, inputs: Any, *, width: float = WIDTH, heads: bool = False) -> None:
    """Prune a model in place with Torch-Pruning: its graph, and one step.

    Args:
        model: changed.
        inputs: what it is called with.
        width: share of the channels of every layer that stays.
        heads: prune whole heads, not channels of all heads.
    """
    import torch_pruning as tp  # pyright: ignore[reportMissingImports] -- optional

    pruner = tp.pruner.MagnitudePruner(
        model,
        inputs,
        importance=tp.importance.GroupMagnitudeImportance(),
        pruning_ratio=1 - width,
        ignored_layers=last_layer(model),
        num_heads=heads_of(model),
        prune_num_heads=heads,
        prune_head_dims=not heads,
    )
    pruner.step()


def peer(case: Case, note: Callable[[Row], None]) -> None:
    """Torch-Pruning to the same share of the channels.

    Args:
        case: the model.
        note: takes what is known so far, after every stage.
    """
    row, reached = started(note)
    try:
        model, inputs = built(case)
        reached("pruning", parameters=sum(p.numel() for p in model.parameters()))
        start = time.perf_counter()
        pruned(model, inputs)
        reached("running", seconds=time.perf_counter() - start, after=sum(p.numel() for p in model.parameters()))
        floating_outputs(model, inputs)
        reached("done", outcome="ok")
    except Exception as error:  # whatever goes wrong is the result
        reached(row["stage"], outcome=f"fails: {said(error)}")
