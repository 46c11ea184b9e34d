"""The filters of the first layer as pictures, grouped by cluster (Figure 4 of Wang et al. 2020)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nac_gpu.calibration.evidence import Evidence
from nac_gpu.network.copying import copied
from nac_gpu.network.running import ExampleInputs, evaluating
from nac_gpu.network.watching import captured
from nac_gpu.planning.prepare import Prepared
from nac_gpu.reporting.contents import Filters
from nac_gpu.tracing.graph import Group

_LIKE = 0.7  # smallest median cosine between the compressed model's filters and the means of the clusters


def first_filters(
    prepared: Prepared, small: nn.Module, example_inputs: ExampleInputs, evidence: Evidence
) -> Filters | str:
    """The filters of the first layer, or the reason why there are none to show.

    Args:
        prepared: plan and original.
        small: the compressed model, without wrappers and parametrisations.
        example_inputs: what both are called with.
        evidence: used to cluster the neurons.
    """
    group, planned = prepared.groups[0], prepared.plan.groups[0]
    weight = group.producers[0].member.tensor
    size = _picture(prepared.model, group, example_inputs)
    if size is None:
        return f"{group.name}, the first layer that can be merged, reads no images of 1 or 3 channels"
    if planned.after == group.size:
        return f"no filters of {group.name} were merged"
    before, after = (_pictures(network.get_parameter(weight), size) for network in (prepared.model, small))
    labels = evidence.tree(group).cut(planned.after).cpu()
    clusters = tuple(tuple((labels == label).nonzero().flatten().tolist()) for label in range(planned.after))
    means = torch.stack([before[list(members)].mean(0) for members in clusters])
    alike = float(F.cosine_similarity(means.flatten(1), after.flatten(1)).abs().median())
    return Filters(group.producers[0].layer, before, after if alike > _LIKE else None, clusters)


def _picture(model: nn.Module, group: Group, example_inputs: ExampleInputs) -> tuple[int, int, int] | None:
    """Colours, height and width of the group's filters as pictures; None if they do not read images."""
    producer = group.producers[0]
    member, module = producer.member, dict(model.named_modules()).get(producer.layer)
    rows = torch.arange(len(model.get_parameter(member.tensor)))
    if member.dim != 0 or not torch.equal(member.index, rows[:, None]):
        return None
    if isinstance(module, nn.Conv2d):
        _, colours, height, width = module.weight.shape
        plain = module.groups == 1 and colours in (1, 3) and height * width > 1
        return (colours, height, width) if plain else None
    if not isinstance(module, nn.Linear) or not isinstance(example_inputs, Tensor) or example_inputs.ndim != 4:
        return None
    _, colours, height, width = example_inputs.shape
    if colours not in (1, 3) or module.in_features != colours * height * width:
        return None
    run = copied(model)
    with evaluating(run):
        seen = captured(run, example_inputs, {producer.layer: 1})[producer.layer]
    as_they_are = bool(seen) and torch.equal(seen[0].flatten(1), example_inputs.flatten(1))
    return (colours, height, width) if as_they_are else None


def _pictures(weight: Tensor, size: tuple[int, int, int]) -> Tensor:
    return weight.detach().float().cpu().reshape(-1, *size).movedim(1, -1)
