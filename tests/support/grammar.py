"""Random networks on small images, drawn from a grammar of blocks.

A network is described by nested tuples, which Hypothesis shrinks and prints: `build(description)` makes it. Every
block keeps the height and width of the image and takes sizes from tensors, as a user who wants any width would.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

Block = tuple[Any, ...]
SIDE = 6
WIDTHS = st.integers(4, 12)

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "silu": lambda: nn.SiLU(inplace=True),
    "softplus": nn.Softplus,
    "prelu": nn.PReLU,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "dropout": nn.Dropout,
}

#: Functions of an image that need no tensors of their own.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled": lambda x: 0.5 * x + 1,
    "square": lambda x: x * x,
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "roll_back": lambda x: x.roll(-1, 1),
    "reverse_index": lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
    "even_then_odd": lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "swap_halves": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "subtract_mean": lambda x: x - x.mean(1, keepdim=True),
    "divide_by_max": lambda x: x / (x.abs().amax(1, keepdim=True) + 1),
    "softmax": lambda x: x.softmax(1),
    "normalise": lambda x: F.normalize(x, dim=1),
    "cumsum": lambda x: x.cumsum(1),
    "sort": lambda x: x.sort(1).values,
    "by_mean_over_pixels": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "by_mean_over_channels": lambda x: x * x.mean(1, keepdim=True).sigmoid(),
    "softmax_over_pixels": lambda x: x.flatten(2).softmax(-1).view_as(x) * 9,
    "gram": lambda x: ((x.flatten(2) @ x.flatten(2).mT / 36).softmax(-1) @ x.flatten(2)).view_as(x),
    "numbered": lambda x: x * torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None, None],
    "pool": lambda x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2),
    "max_pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "transposed": lambda x: x.mT.contiguous(),
    "unfold_fold": lambda x: x.flatten(2).permute(2, 0, 1).reshape(SIDE, SIDE, *x.shape[:2]).permute(2, 3, 0, 1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "first_half": lambda x: x[:, : (x.shape[1] + 1) // 2],
    "every_other": lambda x: x[:, ::2],
    "pad_channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
    "maxout_pairs": lambda x: x.unflatten(1, (-1, 2)).amax(2) if x.shape[1] % 2 == 0 else x,
    "maxout_halves": lambda x: torch.maximum(*x.chunk(2, 1)) if x.shape[1] % 2 == 0 else x,
    "glu": lambda x: F.glu(x, 1) if x.shape[1] % 2 == 0 else x,
    "pixel_shuffle": lambda x: F.avg_pool2d(F.pixel_shuffle(x, 2), 2) if x.shape[1] % 4 == 0 else x,
    "pixel_unshuffle": lambda x: F.interpolate(F.pixel_unshuffle(x, 2), scale_factor=2),
    "shuffle": lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2) if x.shape[1] % 2 == 0 else x,
    "through_list": lambda x: torch.stack(list(x.unbind(1)), 1),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2) if x.shape[1] % 2 == 0 else x,
    "circular": lambda x: F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="circular"), 3, 1),
    "written": lambda x: written(x),
    "unpool": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), [2, 2]),
    "neighbours": lambda x: F.unfold(x, 3, padding=1).unflatten(1, (-1, 9)).mean(2).view_as(x),
    "overlapping": lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[2:], 3, padding=1) / 9,
    "median": lambda x: x - x.flatten(2).median(2).values[..., None, None],
    "largest_pixels": lambda x: x * x.flatten(2).topk(3, 2).values.mean(2)[..., None, None],
    "largest_channels": lambda x: x * x.topk(2, 1).values.mean(1, keepdim=True),
    "sorted_pixels": lambda x: x.flatten(2).gather(2, x.flatten(2).abs().argsort(2)).view_as(x),
    "scattered": lambda x: torch.zeros_like(x.flatten(2)).index_add(2, PLACES, x.flatten(2)).view_as(x),
    "bias_of_ones": lambda x: x + torch.ones_like(x[:1, :, :1, :1]),
}
PLACES = torch.arange(SIDE * SIDE) // 2


def written(x: Tensor) -> Tensor:
    """Half of the rows in a new tensor, and twice the others."""
    out = x.new_zeros(x.shape)
    out[:, :, ::2] = x[:, :, ::2]
    out[:, :, 1::2] += 2 * x[:, :, 1::2]
    return out


#: Movement that a smaller network does not repeat in the same way: copies that merge may change what it moves where.
SIZE_DEPENDENT = frozenset(
    "roll roll_back even_then_odd swap_halves every_other first_half maxout_pairs maxout_halves glu pixel_shuffle "
    "shuffle channel_shuffle numbered repeat repeat_interleave split".split()
)


class Function(nn.Module):
    """One of `FUNCTIONS`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return FUNCTIONS[self.name](x)


class Combine(nn.Module):
    """Two branches of one image, joined in some way; a third branch is the image itself."""

    def __init__(self, how: str, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.how, self.left, self.right = how, left, right

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "split":  # each branch reads its part
            a, b = x.split([x.shape[1] // 2, x.shape[1] - x.shape[1] // 2], 1)
            return torch.cat([self.left(a), self.right(b)], 1)
        a, b = self.left(x), self.right(x)
        if self.how == "concat":
            return torch.cat([a, b], 1)
        if self.how == "concat3":
            return torch.cat([b, x, a], 1)
        if self.how == "add":
            return a + b
        if self.how == "gate":
            return a * b.sigmoid()
        if self.how == "multiply":
            return a * b
        if self.how == "maximum":
            return torch.maximum(a, b)
        if self.how == "stack":
            return torch.stack([a, b], 2).sum(2)
        assert self.how == "attend", self.how  # pixels attend to pixels
        q, k = a.flatten(2), b.flatten(2)
        return (x.flatten(2) @ (q.mT @ k).softmax(-1).mT).view_as(x)


COMBINATIONS = "split concat concat3 add gate multiply maximum stack attend".split()


class Excite(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]


class Twice(nn.Module):
    """A module used two times, with or without the sum of both."""

    def __init__(self, body: nn.Module, add: bool) -> None:
        super().__init__()
        self.body, self.add = body, add

    def forward(self, x: Tensor) -> Tensor:
        once = self.body(x)
        return once + self.body(once) if self.add else self.body(once)


class PerChannel(nn.Module):
    """A tensor with one value for each channel, a parameter or a buffer, multiplied or added."""

    values: Tensor

    def __init__(self, width: int, parameter: bool, multiply: bool) -> None:
        super().__init__()
        values = torch.linspace(0.5, 2, width).view(1, width, 1, 1)
        if parameter:
            self.values = nn.Parameter(values)
        else:
            self.register_buffer("values", values)
        self.multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        return x * self.values if self.multiply else x + self.values


class LastNorm(nn.Module):
    """LayerNorm over channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def width_after(module: nn.Module, width: int) -> int:
    """The channels that a module makes of `width` channels."""
    with torch.no_grad():
        return module.eval()(torch.zeros(1, width, SIDE, SIDE)).shape[1]


def divisor(width: int, wished: int) -> int:
    return next(number for number in range(wished, 0, -1) if width % number == 0)


def block(description: Block, width: int) -> nn.Module:
    """The module of a block that reads `width` channels."""
    kind, *rest = description
    if kind in ACTIVATIONS:
        return ACTIVATIONS[kind]()
    if kind in FUNCTIONS:
        return Function(kind)
    if kind in COMBINATIONS:
        return combination(kind, rest[0], rest[1], width)
    makers: dict[str, Callable[..., nn.Module]] = {
        "conv": lambda n, kernel: nn.Conv2d(width, n, kernel, padding=kernel // 2),
        "conv_bn": lambda n, k: nn.Sequential(nn.Conv2d(width, n, k, padding=k // 2, bias=False), nn.BatchNorm2d(n)),
        "transposed_conv": lambda n: nn.ConvTranspose2d(width, n, 3, padding=1),
        "grouped": lambda n, groups: nn.Conv2d(width, n * divisor(width, groups), 1, groups=divisor(width, groups)),
        "depthwise": lambda multiplier: nn.Conv2d(width, width * multiplier, 3, padding=1, groups=width),
        "bn": lambda: nn.BatchNorm2d(width),
        "bn_plain": lambda: nn.BatchNorm2d(width, affine=False),
        "layer_norm": lambda: LastNorm(width),
        "group_norm": lambda groups: nn.GroupNorm(divisor(width, groups), width),
        "instance_norm": lambda: nn.InstanceNorm2d(width, affine=True),
        "prelu_each": lambda: nn.PReLU(width),
        "per_channel": lambda parameter, multiply: PerChannel(width, parameter, multiply),
        "excite": lambda hidden: Excite(width, hidden),
        "twice": lambda inner, add: Twice(same_width(inner, width), add),
    }
    return makers[kind](*rest)


def combination(kind: str, left: list[Block], right: list[Block], width: int) -> nn.Module:
    if kind == "split":
        if width < 2:
            return nn.Identity()
        return Combine(kind, chain(left, width // 2), chain(right, width - width // 2))
    one, other = chain(left, width), chain(right, width)
    wanted = width_after(one, width)
    if not kind.startswith("concat") and kind != "attend" and width_after(other, width) != wanted:
        other = nn.Sequential(other, nn.Conv2d(width_after(other, width), wanted, 1))
    elif kind == "attend" and width_after(other, width) != wanted:
        other = nn.Conv2d(width, wanted, 1)
    return Combine(kind, one, other)


def chain(descriptions: list[Block], width: int) -> nn.Sequential:
    """Blocks one after the other."""
    modules: list[nn.Module] = []
    for description in descriptions:
        modules.append(block(description, width))
        width = width_after(modules[-1], width)
        if width > 24:  # concatenations and repetitions grow
            modules.append(nn.Conv2d(width, 8, 1))
            width = 8
    return nn.Sequential(*modules)


def same_width(descriptions: list[Block], width: int) -> nn.Module:
    inner = chain(descriptions, width)
    after = width_after(inner, width)
    return inner if after == width else nn.Sequential(inner, nn.Conv2d(after, width, 1))


class Head(nn.Module):
    """What makes the outputs: a Linear behind pooling or flattening, or a convolution."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        self.layer = (
            nn.Conv2d(width, 3, 1) if kind == "conv" else nn.Linear(width * (SIDE**2 if kind == "flatten" else 1), 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "flatten":
            x = x.flatten(1)
        elif self.kind == "mean":
            x = x.mean((2, 3))
        elif self.kind == "tokens":
            x = x.flatten(2).transpose(1, 2)
        return self.layer(x)


def build(blocks: list[Block], head: str) -> nn.Module:
    """A network of these blocks on images of 3 channels, and a head."""
    stem = nn.Conv2d(3, 8, 3, padding=1)
    body = chain(blocks, 8)
    return nn.Sequential(stem, body, Head(head, width_after(body, 8)))


def kinds(blocks: list[Block]) -> set[str]:
    """Names of all blocks in a description."""
    found: set[str] = set()
    for kind, *rest in blocks:
        found.add(kind)
        for inner in rest:
            if isinstance(inner, list):
                found |= kinds(inner)
    return found


ARGUMENTS: dict[str, tuple[st.SearchStrategy[Any], ...]] = {
    **dict.fromkeys([*ACTIVATIONS, *FUNCTIONS], ()),
    "conv": (WIDTHS, st.sampled_from([1, 3])),
    "conv_bn": (WIDTHS, st.sampled_from([1, 3])),
    "transposed_conv": (WIDTHS,),
    "grouped": (st.integers(1, 3), st.integers(2, 4)),
    "depthwise": (st.integers(1, 2),),
    "bn": (),
    "bn_plain": (),
    "layer_norm": (),
    "group_norm": (st.integers(1, 4),),
    "instance_norm": (),
    "prelu_each": (),
    "per_channel": (st.booleans(), st.booleans()),
    "excite": (st.integers(2, 5),),
}
LAYERS = ("conv", "conv_bn", "transposed_conv", "grouped", "depthwise")


@st.composite
def blocks(draw: st.DrawFn, most: int, depth: int) -> list[Block]:
    """Up to `most` blocks that are nested up to `depth` times; about every other one is a layer."""
    found: list[Block] = []
    for _ in range(draw(st.integers(1, most))):
        kind = draw(st.sampled_from([*ARGUMENTS, *LAYERS * 5, *(depth > 0) * 2 * (*COMBINATIONS, "twice")]))
        if kind in COMBINATIONS:
            found.append((kind, draw(blocks(2, depth - 1)), draw(blocks(2, depth - 1) | st.just([]))))
        elif kind == "twice":
            found.append((kind, draw(blocks(2, depth - 1)), draw(st.booleans())))
        else:
            found.append((kind, *(draw(argument) for argument in ARGUMENTS[kind])))
    return found


def networks() -> st.SearchStrategy[tuple[list[Block], str]]:
    """Descriptions of networks: the arguments of `build`."""
    return st.tuples(blocks(6, 2), st.sampled_from(["mean", "flatten", "conv", "tokens"]))
