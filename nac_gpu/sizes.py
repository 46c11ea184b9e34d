"""What modules say about their sizes, made to agree with their tensors.

Layers of PyTorch are known. Sizes that are not a tensor's own (heads, groups) follow from the groups. Sizes that other
people's modules keep are found by name and value; whether the guess is right is tried.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from nac_gpu.attention import shrink
from nac_gpu.groups import Group

#: New values by (module, attribute).
Attributes = Mapping[tuple[str, str], object]

_COUNT = re.compile(r"heads?$|groups$")
_HEADS = re.compile(r"heads$|n_head$")
_HIDDEN = re.compile(r"intermediate_size$|ffn_dim$|d_ff$|n_inner$")
_WIDTH = re.compile(r"dim|size|width|channels|features|hidden|planes|inner|embed|chunk|split")


def set_sizes(module: nn.Module) -> None:
    """Make a layer's attributes (`in_features`, `out_channels`, ...) say what its tensors are."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        _set_convolution(module)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        tensor = module.running_mean if module.running_mean is not None else module.weight
        assert isinstance(tensor, Tensor), "a normalisation without tensors has no sizes"
        module.num_features = len(tensor)
    elif isinstance(module, nn.GroupNorm):
        if module.num_groups == module.num_channels:
            module.num_groups = len(module.weight)
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.RNNBase):
        module.input_size = module._flat_weights[0].shape[1]  # pyright: ignore[reportOptionalMemberAccess]
        weight = module.get_parameter("weight_hh_l0")
        if module.proj_size:
            module.proj_size = weight.shape[1]
            module.hidden_size = module.get_parameter("weight_hr_l0").shape[1]
        else:
            module.hidden_size = weight.shape[1]
    elif isinstance(module, nn.RNNCellBase):
        module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]
    elif isinstance(module, nn.MultiheadAttention):
        weight = module.q_proj_weight if module.in_proj_weight is None else module.in_proj_weight
        if len(weight) != module.embed_dim * (1 if module.in_proj_weight is None else 3):
            shrink(module)
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # Hugging Face's transposed Linear
        weight = module.get_parameter("weight")
        vars(module).update(nx=weight.shape[0], nf=weight.shape[1])


def _set_convolution(module: nn.modules.conv._ConvNd) -> None:
    rows, columns = (1, 0) if module.transposed else (0, 1)
    made, read = module.weight.shape[rows], module.weight.shape[columns]
    if module.groups == module.in_channels and module.groups > 1:  # depthwise, with one kernel or several a channel
        times = module.out_channels // module.groups
        module.groups = read if module.transposed else made // times
    module.out_channels, module.in_channels = made, read
    if module.transposed:
        module.out_channels *= module.groups
    else:
        module.in_channels *= module.groups


def attributes(model: nn.Module, groups: Sequence[Group], widths: Sequence[int]) -> dict[tuple[str, str], object]:
    """The new values of the attributes that groups know of."""
    modules = dict(model.named_modules())
    values: dict[tuple[str, str], object] = {}
    for group, width in zip(groups, widths, strict=True):
        for name, attribute in group.attributes:
            old = values.get((name, attribute), getattr(modules[name], attribute))
            values[name, attribute] = _scaled(old, group.size, width)
            if attribute == "groups":  # of a convolution: it read `groups` times its weight's columns
                layer = modules[name]
                assert isinstance(layer, nn.modules.conv._ConvNd), "only convolutions have groups"
                values[name, "in_channels"] = _scaled(layer.in_channels, group.size, width)
    return values


def _scaled(value: object, before: int, after: int) -> object:
    assert isinstance(value, int), "only whole numbers are scaled"
    return value * after // before


def set_configs(model: nn.Module, groups: Sequence[Group], widths: Sequence[int]) -> None:
    """Make the configurations of a compressed Hugging Face model say what its layers are, where one number can.

    A configuration holds one width for all layers: it is changed where all its groups of that width became equal.

    Args:
        model: compressed; its configurations are its own.
        groups: what was compressed.
        widths: to how many.
    """
    modules = dict(model.named_modules())
    found: dict[int, tuple[object, list[tuple[Group, int]]]] = {}
    for group, width in zip(groups, widths, strict=True):
        for length in range(len(group.layers[0].split(".")), -1, -1):
            holder = modules.get(".".join(group.layers[0].split(".")[:length]))
            config = getattr(holder, "config", None)
            if hasattr(config, "to_dict"):
                found.setdefault(id(config), (config, []))[1].append((group, width))
                break
    for config, members in found.values():
        for name, value in list(vars(config).items()):
            heads = _HEADS.search(name) is not None
            if not isinstance(value, int) or not (heads or _HIDDEN.search(name)):
                continue
            changes = {
                (group.size, width)
                for group, width in members
                if bool(group.units) == heads and (value % group.size == 0 if heads else value == group.size)
            }
            if len(changes) != 1:
                continue
            before, after = changes.pop()
            hidden = getattr(config, "hidden_size", None)
            if heads and "key_value" not in name and hidden and getattr(config, "head_dim", None) is None:
                vars(config)["head_dim"] = hidden // value  # no longer what follows from the number of heads
            setattr(config, name, value * after // before)


def guesses(modules: Mapping[str, nn.Module], group: Group) -> Iterator[tuple[tuple[str, str], ...]]:
    """Sets of attributes of modules, by name, that may have to follow a group's size, the likeliest first."""
    units = tuple(name if name in modules else "" for name in group.units)  # the model itself goes by its class
    own = tuple((name, kind) for name in units for kind in _own_count(modules[name]))
    if group.units:
        heads = [name for name in units if not _own_count(modules[name])]
        counts = own + tuple(_matching(modules, heads, _COUNT, lambda value: value % group.size == 0))
        yield counts
        rows = {member.index.numel() for member in group.members} | {group.size}
        wide = tuple(_matching(modules, heads, _WIDTH, lambda value: value in rows))
        if wide:
            yield counts + wide
        return
    yield ()
    parents = dict.fromkeys(name.rpartition(".")[0] for name in group.layers)
    known = [name for name in parents if name in modules and not type(modules[name]).__module__.startswith("torch.nn")]
    sizes = {group.size} | {member.index.numel() for member in group.members}
    wide = tuple(_matching(modules, known, _WIDTH, lambda value: value in sizes))
    if wide:
        yield wide


def _own_count(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.modules.conv._ConvNd):
        return ("groups",)
    return ("num_groups",) if isinstance(module, nn.GroupNorm) else ()


def _matching(
    modules: Mapping[str, nn.Module], names: Sequence[str], pattern: re.Pattern[str], fits: Callable[[int], bool]
) -> Iterator[tuple[str, str]]:
    """Attributes of these modules that hold a whole number of the right name and value."""
    for name in names:
        for attribute, value in vars(modules[name]).items():
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 1
            if whole and pattern.search(attribute) and fits(value):
                yield name, attribute
