"""Faster training of convolutions on a CPU: weight gradients as matrix products.

oneDNN's bfloat16 weight gradient of a 3x3 convolution on small images (up to 4x4) takes 3 to 12 times as long as the
nine matrix products it consists of (512 to 512 channels, batch 512, 4x4: 168 against 50 ms; 2x2: 129 against 11 ms on
2 cores with AMX). About 40 % of a VGG-16 step on CIFAR was spent there.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode

LARGEST_IMAGE = 16  # positions (4x4); above, oneDNN is as fast or faster


class _SmallConv3x3(torch.autograd.Function):
    """3x3 convolution with stride 1 and padding 1."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.has_bias = bias is not None
        return F.conv2d(images, weight, bias, padding=1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor, Tensor | None]:
        images, weight = cast(tuple[Tensor, Tensor], ctx.saved_tensors)
        grad = cast(Tensor, grads[0])
        inputs, outputs = images.shape[1], grad.shape[1]
        height, width = images.shape[2:]
        grad_images = None
        if ctx.needs_input_grad[0]:
            grad_images = conv2d_input(images.shape, weight, grad, padding=1)
        padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        rows = grad.permute(1, 0, 2, 3).reshape(outputs, -1)
        grad_weight = weight.new_empty(outputs, 3, 3, inputs)
        for i in range(3):
            for j in range(3):
                grad_weight[:, i, j] = rows @ padded[:, i : i + height, j : j + width].reshape(-1, inputs)
        return grad_images, grad_weight.permute(0, 3, 1, 2), rows.sum(1) if ctx.has_bias else None


class fast_weight_gradients(TorchFunctionMode):
    """Within this context, 3x3 convolutions of small images under CPU autocast take their weight gradient by GEMM."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.conv2d and not kwargs and len(args) == 7 and self._applies(*args):
            dtype = torch.get_autocast_dtype("cpu")
            images, weight, bias = args[:3]
            bias = bias if bias is None else bias.to(dtype)
            return _SmallConv3x3.apply(images.to(dtype), weight.to(dtype), bias)
        return func(*args, **kwargs)

    @staticmethod
    def _applies(
        images: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> bool:
        return (
            torch.is_grad_enabled()
            and torch.is_autocast_enabled("cpu")
            and images.device.type == "cpu"
            and images.shape[2:].numel() <= LARGEST_IMAGE
            and weight.shape[2:] == (3, 3)
            and (stride, padding, dilation, groups) == ((1, 1), (1, 1), (1, 1), 1)
        )
