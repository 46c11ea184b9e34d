"""SliceGPT (Ashkboos et al. 2024) for Llama-like models: our reading of the paper, not its code.

The residual stream is rotated by one matrix in front of every norm: the principal components of what the norm puts out,
without its scales, which go to the layers behind it. Then the last components are cut off, in all places the same
number. Since the rotations differ, every residual connection gets a matrix that takes one basis to the next; these
matrices are parameters and are counted. Norms keep dividing by the root of the sum of squares over the original width.
Components are computed from the calibration inputs as the sliced layers before pass them on.
"""

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from common.language_blocks import largest_whole, layers_of, layout_of, made_linear, parameters
from common.language_data import Batch
from common.language_statistics import Walk

_READ = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_WRITTEN = ("self_attn.o_proj", "mlp.down_proj")


class UnitNorm(nn.Module):
    """RMSNorm without scales, of vectors that had more channels."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.width, self.epsilon = width, epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """Divide vectors by their root mean square over the original width."""
        return hidden * (hidden.square().sum(-1, keepdim=True) / self.width + self.epsilon).rsqrt()


class SlicedLayer(nn.Module):
    """A layer whose residual connections change the basis."""

    def __init__(self, layer: Any, norm: UnitNorm, attention_shortcut: nn.Module, mlp_shortcut: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.norm = layer.self_attn, layer.mlp, norm
        self.attention_shortcut, self.mlp_shortcut = attention_shortcut, mlp_shortcut

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """As the layer would."""
        attended = self.self_attn(hidden_states=self.norm(hidden_states), **kwargs)[0]
        hidden_states = self.attention_shortcut(hidden_states) + attended
        return self.mlp_shortcut(hidden_states) + self.mlp(self.norm(hidden_states))


def sliced_parameters(model: Any, width: int, tied: bool) -> int:
    """How many parameters there are when the residual stream has so many channels.

    Args:
        model: the original.
        width: channels that stay.
        tied: the table of embeddings stays as it is and is the head's, too, with a matrix behind and before it.
    """
    layers, head = layers_of(model), model.get_output_embeddings()
    full = head.in_features
    outside = full * head.out_features + 2 * full * width if tied else 2 * head.out_features * width
    total = outside + (0 if head.bias is None else head.out_features)
    for layer in layers:
        norms = layer.input_layernorm.weight.numel() + layer.post_attention_layernorm.weight.numel()
        cut = sum(parameters(layer.get_submodule(name)) for name in (*_READ, *_WRITTEN))
        total += parameters(layer) - norms - cut + 2 * width * width
        for name in (*_READ, *_WRITTEN):
            module = layer.get_submodule(name)
            rows, columns = module.weight.shape
            rows, columns = (rows, width) if name in _READ else (width, columns)
            total += rows * columns + (0 if module.bias is None else rows)
    return total


def components(model: Any, batches: Sequence[Batch], width: int) -> list[Tensor]:
    """The bases in front of every norm, [original width, width] each: two for each layer, and one for the last norm."""
    walk, found = Walk(model, batches), []
    full = model.get_output_embeddings().in_features

    def project(epsilon: float) -> None:
        """Find the basis of all hidden states, and keep what it spans."""
        norm, products = UnitNorm(full, epsilon), torch.zeros(full, full, dtype=torch.float64)
        for hidden, mask in zip(walk.hidden, walk.masks, strict=True):
            unit = norm(hidden[mask])
            products += (unit.T @ unit).double()
        basis = torch.linalg.eigh(products).eigenvectors.flip(1)[:, :width].float()
        found.append(basis)
        if width < full:
            walk.hidden = [hidden @ basis @ basis.T for hidden in walk.hidden]

    for layer in layers_of(model):
        project(layer.input_layernorm.variance_epsilon)
        for number, hidden in enumerate(walk.hidden):
            attended = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **walk.kwargs[number])[0]
            walk.hidden[number] = hidden + attended
        project(layer.post_attention_layernorm.variance_epsilon)
        for number, hidden in enumerate(walk.hidden):
            walk.hidden[number] = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    project(model.model.norm.variance_epsilon)
    return found


def _slice_layer(layer: Any, bases: Sequence[Tensor], full: int) -> SlicedLayer:
    """A layer between bases: in front of its attention, in front of its MLP, and behind it."""
    scales = {"self_attn": layer.input_layernorm.weight, "mlp": layer.post_attention_layernorm.weight}
    before = {"self_attn": bases[0], "mlp": bases[1]}
    behind = {"self_attn": bases[1], "mlp": bases[2]}
    for name in (*_READ, *_WRITTEN):
        part, _, last = name.partition(".")
        module = layer.get_submodule(name)
        if name in _READ:
            made = made_linear((module.weight * scales[part]) @ before[part], module.bias)
        else:
            bias = None if module.bias is None else module.bias @ behind[part]
            made = made_linear(behind[part].T @ module.weight, bias)
        setattr(layer.get_submodule(part), last, made)
    shortcuts = [made_linear(after.T @ first) for first, after in pairwise(bases)]
    return SlicedLayer(layer, UnitNorm(full, layer.input_layernorm.variance_epsilon), *shortcuts)


@torch.no_grad()
def sliced_to(model: nn.Module, width: int, batches: Sequence[Batch], tied: bool = False) -> nn.Module:
    """A copy of a model whose residual stream has so many channels.

    Args:
        model: a Llama-like causal language model, not changed.
        width: channels that stay.
        batches: the calibration inputs.
        tied: as in `sliced_parameters`.

    Raises:
        TypeError: the model is another one.
    """
    if layout_of(model).layers != "model.layers" or not hasattr(model, "get_output_embeddings"):
        raise TypeError(f"{type(model).__name__} is no Llama-like causal language model")
    small: Any = copy.deepcopy(model)
    bases = components(small, batches, width)
    head, table, inner = small.get_output_embeddings(), small.get_input_embeddings(), small.model
    full = head.in_features
    inner.layers = nn.ModuleList(
        [_slice_layer(layer, bases[2 * number : 2 * number + 3], full) for number, layer in enumerate(inner.layers)]
    )
    out = inner.norm.weight[:, None] * bases[-1]  # [full, width]
    inner.norm = UnitNorm(full, inner.norm.variance_epsilon)
    if tied:
        inner.embed_tokens = nn.Sequential(table, made_linear(bases[0].T))
        small.lm_head = nn.Sequential(made_linear(out), head)
    else:
        inner.embed_tokens = nn.Embedding.from_pretrained(table.weight @ bases[0], padding_idx=table.padding_idx)
        small.lm_head = made_linear(head.weight @ out, head.bias)
    return small


def sliced(model: Any, most: float, batches: Sequence[Batch], tied: bool = False) -> nn.Module:
    """A copy of a model with the widest residual stream with which it has no more than so many parameters.

    Args:
        model: as in `sliced_to`.
        most: parameters.
        batches: the calibration inputs.
        tied: as in `sliced_parameters`.

    Raises:
        ValueError: the budget cannot be met.
        TypeError: the model is no Llama-like causal language model.
    """
    full = model.get_output_embeddings().in_features
    width = largest_whole(lambda number: sliced_parameters(model, number, tied), most, full)
    return sliced_to(model, width, batches, tied)
