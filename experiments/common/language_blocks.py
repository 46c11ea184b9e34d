"""Transformers as layers of heads and neurons that can be removed: Llama-like decoders and BERT-like encoders."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["heads", "neurons"]


@dataclass(frozen=True)
class Layout:
    """Where a family of models has its layers and what they consist of, by names of modules.

    Attributes:
        layers: the list of layers.
        heads: in a layer, the linear layers that make queries, keys and values; the second makes keys.
        attended: the one that reads what the heads compute.
        neurons: those that make the neurons of the MLP.
        down: the one that reads them.
        sizes: in a layer, the module and its attribute that says how many channels a head has.
    """

    layers: str
    heads: tuple[str, str, str]
    attended: str
    neurons: tuple[str, ...]
    down: str
    sizes: tuple[str, str]


LAYOUTS = (
    Layout(
        "model.layers",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj",
        ("self_attn", "head_dim"),
    ),
    Layout(
        "encoder.layer",
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.output.dense",
        ("intermediate.dense",),
        "output.dense",
        ("attention.self", "attention_head_size"),
    ),
)


@dataclass(frozen=True)
class Group:
    """Units of a layer of which any may be removed: neurons of an MLP, or heads with the keys that they share.

    Attributes:
        layer: the number of the layer.
        kind: what the units are.
        units: how many there are.
        makers: linear layers that make them, by name, and how many rows of each belong to a unit.
        reader: the linear layer that reads them.
        columns: how many of its columns belong to a unit.
    """

    layer: int
    kind: Kind
    units: int
    makers: tuple[tuple[str, int], ...]
    reader: str
    columns: int


#: Which units of a group stay: their numbers in ascending order.
Kept = Mapping[Group, Tensor]


def layout_of(model: nn.Module) -> Layout:
    """The layout of a model.

    Raises:
        TypeError: it has none of those that are known.
    """
    names = {name for name, _ in model.named_modules()}
    for layout in LAYOUTS:
        inner = (*layout.heads, layout.attended, *layout.neurons, layout.down)
        if all(f"{layout.layers}.0.{name}" in names for name in inner):
            return layout
    raise TypeError(f"{type(model).__name__} has neither the layers of a Llama nor those of a BERT")


def layers_of(model: nn.Module) -> list[Any]:
    """The layers of a model, first to last."""
    return list(model.get_submodule(layout_of(model).layers).children())


def set_layers(model: Any, numbers: Sequence[int]) -> None:
    """Keep only these layers of a model, in this order. The model is changed, and the configuration that it holds."""
    layers = layers_of(model)
    _put(model, layout_of(model).layers, nn.ModuleList([layers[number] for number in numbers]))
    model.config.num_hidden_layers = len(numbers)
    for place, layer in enumerate(layers_of(model)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place


def linear(model: nn.Module, name: str) -> nn.Linear:
    """A linear layer by its name.

    Raises:
        TypeError: it is none.
    """
    found = model.get_submodule(name)
    if not isinstance(found, nn.Linear):
        raise TypeError(f"{name} is {type(found).__name__}, expected a linear layer")
    return found


def groups_of(model: nn.Module) -> list[Group]:
    """The heads and the neurons of every layer, in the order in which the model computes them."""
    layout, found = layout_of(model), []
    for number, layer in enumerate(layers_of(model)):
        path = f"{layout.layers}.{number}."
        module, attribute = layout.sizes
        size = getattr(layer.get_submodule(module), attribute)
        counts: tuple[tuple[Kind, tuple[str, ...], str, int], ...] = (
            ("heads", layout.heads, layout.attended, linear(layer, layout.heads[1]).out_features // size),
            ("neurons", layout.neurons, layout.down, linear(layer, layout.down).in_features),
        )
        for kind, makers, reader, units in counts:
            rows = tuple((path + name, linear(layer, name).out_features // units) for name in makers)
            columns = linear(layer, reader).in_features // units
            found.append(Group(number, kind, units, rows, path + reader, columns))
    return found


def parameters(model: nn.Module) -> int:
    """How many a model has; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def unit_parameters(model: nn.Module, group: Group) -> int:
    """How many parameters go with a unit."""
    made = 0
    for name, rows in group.makers:
        layer = linear(model, name)
        made += rows * (layer.in_features + (layer.bias is not None))
    return made + group.columns * linear(model, group.reader).out_features


def channels(units: Tensor, each: int) -> Tensor:
    """The channels of units that have so many each."""
    return (units[:, None] * each + torch.arange(each)).flatten()


def per_unit(values: Tensor, each: int) -> Tensor:
    """Sums over the channels of each unit."""
    return values.view(-1, each).sum(1)


def made_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with copies of these values."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer.requires_grad_(False)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@torch.no_grad()
def remove_units(model: nn.Module, group: Group, kept: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Remove all other units of a group from a model; nothing happens if none are left to be removed.

    Args:
        model: changed.
        group: the group.
        kept: the units that stay.
        weight: of the reader, for what they compute.
        bias: of the reader.
    """
    if len(kept) == group.units:
        return
    for name, rows in group.makers:
        layer, chosen = linear(model, name), channels(kept, rows)
        _put(model, name, made_linear(layer.weight[chosen], None if layer.bias is None else layer.bias[chosen]))
    _put(model, group.reader, made_linear(weight, bias))


def largest_whole(parameters_at: Callable[[int], int], most: float, high: int) -> int:
    """The largest of the numbers from 1 to `high` at which there are no more than so many parameters.

    Raises:
        ValueError: there is none.
    """
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if parameters_at(middle) <= most else (low, middle - 1)
    if low == 0:
        raise ValueError(f"the smallest has {parameters_at(1)} parameters, expected at most {int(most)}")
    return low
