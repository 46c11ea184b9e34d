"""Checks whether the weights of a model can be compressed."""

import torch
from torch import nn


def check_weights(model: nn.Module) -> None:
    """Check that every parameter is floating and finite; otherwise distances between neurons have no meaning.

    Complex parameters are let through, too: the neurons that they make or read are left alone.

    Raises:
        TypeError: integer parameters, naming the first.
        ValueError: NaN or infinity, naming the first.
    """
    for name, parameter in model.named_parameters():
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise TypeError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}, expected a floating type; "
                "compress the model before it is quantised, or convert it"
            )
        # The sum takes one pass and is not finite if any value is not. But a sum of finite values may overflow, so a
        # sum that is not finite is followed by an exact check.
        if not bool(torch.isfinite(parameter.sum())) and not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            raise ValueError(
                f"{name} has {bad} values that are NaN or infinite, expected finite weights; "
                "the training that made them has diverged, take an earlier checkpoint"
            )
