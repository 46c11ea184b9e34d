"""What the zoo and the tests of architectures ask of every network beside `nac_gpu.testing`."""

from collections.abc import Iterable

import torch
from torch import nn

from nac_gpu.network.reaching import tensors_in
from nac_gpu.network.running import ExampleInputs, call
from nac_gpu.testing import floating_outputs
from nac_gpu.tracing.graph import Group


def compressible_share(model: nn.Module, groups: Iterable[Group]) -> float:
    """The share of the parameters' elements that lie at positions of some group, along any dimension."""
    parameters = dict(model.named_parameters())
    untouched = {name: torch.ones((1,) * p.ndim, dtype=torch.bool) for name, p in parameters.items()}
    for group in groups:
        for member in group.members:
            if member.tensor in parameters:
                shape = [1] * parameters[member.tensor].ndim
                shape[member.dim] = parameters[member.tensor].shape[member.dim]
                kept = torch.ones(shape[member.dim], dtype=torch.bool)
                kept[member.index.flatten().cpu()] = False
                untouched[member.tensor] = untouched[member.tensor] & kept.reshape(shape)
    total = sum(p.numel() for p in parameters.values())
    left = sum(int(mask.expand(parameters[name].shape).sum()) for name, mask in untouched.items())
    return (total - left) / total if total else 0.0


def training_step(model: nn.Module, inputs: ExampleInputs) -> None:
    """Forward in eval mode, then a step of training on the squares of the outputs; raises what the model raises."""
    floating_outputs(model, inputs)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4)
    loss = torch.stack([t.square().sum() for t in tensors_in(call(model, inputs)) if t.requires_grad]).sum()
    loss.backward()
    optimizer.step()
    model.eval()
