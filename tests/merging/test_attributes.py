"""Sizes that modules keep, under whatever name and in whatever container, follow the groups."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.fastvit import FastVit
from timm.models.mobilenetv3 import MobileNetV3
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.nn import functional as F

import nac_gpu as nac
from nac_gpu.merging.attributes import Following, attributes, guesses, stale
from nac_gpu.network.comparing import relative_error
from nac_gpu.network.kept_numbers import reads_of
from nac_gpu.testing import randomise
from nac_gpu.tracing.graph import Choice
from nac_gpu.tracing.trace import record

VECTORS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
SERIES = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def halved(model: nn.Module, inputs: Any, width: Any = 0.5) -> Any:
    """The model with half of its neurons, which were merged where they are copies without changing the outputs."""
    nac.testing.check_copies(randomise(model).eval(), inputs, width=width)
    return nac.compress(model, inputs, width=width, calibration="none")


def first_guesses(model: nn.Module, inputs: Any, widths: dict[str, int]) -> list[Choice]:
    """The groups with the attributes of their first guesses."""
    modules = dict(model.named_modules())
    found = []
    for group in record(model.eval(), inputs).groups:
        own = {**vars(group), "attributes": next(guesses(modules, group))}
        found.append(Choice(type(group)(**own), widths.get(group.name, group.size)))
    return found


class Owner(nn.Module):
    """Makes the initial state of a recurrent layer from a size that it keeps."""

    def __init__(self, kind: type[nn.RNNBase], name: str) -> None:
        super().__init__()
        setattr(self, name, 24)
        self.name, self.recurrent, self.last = name, kind(6, 24), nn.Linear(24, 3)  # type: ignore[call-arg, arg-type]

    def forward(self, x: Tensor) -> Tensor:
        state: Any = x.new_zeros(1, x.shape[1], getattr(self, self.name))
        return self.last(self.recurrent(x, (state, state) if isinstance(self.recurrent, nn.LSTM) else state)[0])


@pytest.mark.parametrize("name", ["hidden_size", "half", "c", "filters", "units", "_width"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_owner_of_a_recurrent_layer_keeps_its_size_under_any_name(kind: type[nn.RNNBase], name: str) -> None:
    assert getattr(halved(Owner(kind, name), SERIES), name) == 12


class Reader(nn.Module):
    def __init__(self, *, depth: int) -> None:
        super().__init__()
        self.ch_in, self.inside = 16, Reader(depth=depth - 1) if depth else nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == self.ch_in
        return self.inside(x)


@pytest.mark.parametrize("depth", [0, 2])
def test_what_a_reader_asserts_follows(depth: int) -> None:
    small = halved(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), Reader(depth=depth)), VECTORS)
    assert all(module.ch_in == 8 for module in small.modules() if isinstance(module, Reader))


class View(nn.Module):
    """Has no tensors: it stands between the layer that makes the channels and the one that reads them."""

    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        shape = self.shape
        if isinstance(shape, dict):
            shape = (-1, shape["channels"], *shape["space"])
        elif isinstance(shape, SimpleNamespace):
            shape = (-1, shape.channels, 4, 9)
        return x.view(*map(int, shape))


SHAPES = {
    "tuple": (-1, 16, 4, 9),
    "list": [-1, 16, 4, 9],
    "size": torch.Size([2, 16, 4, 9]),
    "dictionary": {"channels": 16, "space": (4, 9)},
    "object": SimpleNamespace(channels=16),
    "numpy": (-1, np.int64(16), 4, 9),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sizes_in_containers_follow_and_are_saved(shape: Any, tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 16, 3), View(copy.deepcopy(shape)), nn.ReLU(), nn.Conv2d(16, 3, 2))

    model = build()
    small = halved(model, IMAGES)
    assert small[0].out_channels == 8
    assert type(small[1].shape) is type(shape)
    assert model[1].shape == shape
    nac.save(small, tmp_path / "small.safetensors")
    loaded: Any = nac.load(tmp_path / "small.safetensors", build)
    assert loaded[1].shape == small[1].shape != shape
    assert torch.equal(loaded(IMAGES), small(IMAGES))


@pytest.mark.parametrize("channels", [16, 6])
def test_unflatten_follows_also_where_other_sizes_are_the_same(channels: int) -> None:
    layers = nn.Conv2d(3, channels, 3), nn.Flatten(), nn.Unflatten(1, (channels, 6, 6)), nn.Conv2d(channels, 3, 2)
    assert halved(nn.Sequential(*layers), IMAGES)[2].unflattened_size == (channels // 2, 6, 6)


class OfTraining(nn.Module):
    """A size is used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.first, self.last = 16, nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + torch.randn(len(x), self.dim) if self.training else x)


def test_a_size_of_training_follows() -> None:
    assert halved(OfTraining(), VECTORS).train()(VECTORS).shape == (4, 3)


class Repeats(nn.Module):
    """The same number is a size and means something else: how often, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)
        self.dim = self.rounds = self.scale = self.half = 16

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = x.view(-1, self.half) * self.dim**-0.5
        for _ in range(self.rounds):
            x = x * 0.9
        return self.last(x / self.scale)


def test_what_is_no_size_of_the_group_keeps_its_value() -> None:
    small = halved(Repeats(), VECTORS)
    assert (small.first.out_features, small.half) == (8, 8)
    assert (small.dim, small.rounds, small.scale) == (16, 16, 16)


def test_guesses_have_what_forward_reads_and_what_names_say() -> None:
    class Some(Repeats):
        def __init__(self) -> None:
            super().__init__()
            self.never = self.hidden_dim = 16

    model = Some()
    (group,) = record(model.eval(), VECTORS).groups
    with reads_of(copy.deepcopy(model)) as seen:
        pass
    twin = copy.deepcopy(model)
    with reads_of(twin) as seen:
        twin(VECTORS)
    assert type(twin) is Some
    found = list(guesses({"": model, "first": model.first, "last": model.last}, group, lambda: seen))
    assert found[0] == (Following("", "dim"), Following("", "hidden_dim"))
    assert all(Following("", "hidden_dim") in guess for guess in found)  # not read, so it cannot be wrong here
    names = {item.attribute for guess in found for item in guess}
    assert names == {"dim", "hidden_dim", "rounds", "scale", "half"}
    assert (Following("", "hidden_dim"), Following("", "half", True)) in found
    assert len(set(found)) == len(found) < 16


class Fusible(nn.Module):
    """Two branches and, where channels stay, a third, which `fuse` makes one: its sizes are read by nothing else."""

    def __init__(self, in_chs: int, out_chs: int, groups: int = 1, skip: bool = False) -> None:
        super().__init__()
        self.in_chs, self.out_chs, self.groups = in_chs, out_chs, groups
        self.wide = nn.Conv2d(in_chs, out_chs, 3, padding=1, groups=groups)
        self.point = nn.Conv2d(in_chs, out_chs, 1, groups=groups)
        self.same = nn.BatchNorm2d(in_chs) if skip else None
        self.fused: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.fused is not None:
            return F.relu(self.fused(x))
        return F.relu(self.wide(x) + self.point(x) + (0 if self.same is None else self.same(x)))

    def fuse(self) -> None:
        made = nn.Conv2d(self.in_chs, self.out_chs, 3, padding=1, groups=self.groups)
        kernel = self.wide.weight + F.pad(self.point.weight, (1, 1, 1, 1))
        bias = self.wide.bias + self.point.bias
        if self.same is not None:
            norm, each = self.same, self.in_chs // self.groups
            assert isinstance(norm.running_var, Tensor)
            assert isinstance(norm.running_mean, Tensor)
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            only = torch.zeros(self.out_chs, each, 3, 3)
            only[torch.arange(self.out_chs), torch.arange(self.out_chs) % each, 1, 1] = scale
            kernel, bias = kernel + only, bias + norm.bias - norm.running_mean * scale
        made.weight.data, made.bias.data = kernel.detach(), bias.detach()
        self.fused, self.wide, self.point, self.same = made, None, None, None  # type: ignore[assignment]


def fusible() -> nn.Sequential:
    blocks = Fusible(3, 16), Fusible(16, 16, 16, skip=True), Fusible(16, 16), Fusible(16, 12, 2), Fusible(12, 5)
    return nn.Sequential(*blocks)


@pytest.mark.parametrize("widths", [0.5, {"0.wide": 12, "2.wide": 6, "3.wide": 4}], ids=["half", "different"])
def test_branches_of_a_smaller_network_can_be_fused(widths: Any) -> None:
    small = halved(fusible(), IMAGES, widths)
    with torch.no_grad():
        before = small(IMAGES)
        for block in small:
            block.fuse()
            assert (block.in_chs, block.out_chs) == (block.fused.in_channels, block.fused.out_channels)
        assert relative_error([small(IMAGES)], [before]) < 1e-5
    assert small[0].out_chs == small[1].in_chs == small[1].groups == small[1].out_chs == small[2].in_chs < 16


def byob(kind: str) -> nn.Module:
    """A small RepVGG ("rep"), or a small MobileOne ("one"), half of whose blocks are depthwise."""
    sizes = [(width, group) for width in (16, 32) for group in ((1, 0) if kind == "one" else (0,))]
    blocks = tuple(ByoBlockCfg(type=kind, d=1, c=width, s=1, gs=group) for width, group in sizes)
    return ByobNet(ByoModelCfg(blocks=blocks, stem_type=kind, stem_chs=16), num_classes=5)


def fast_vit() -> nn.Module:
    sizes = {"layers": (1, 1), "embed_dims": (16, 32), "mlp_ratios": (2, 2), "token_mixers": ("repmixer",) * 2}
    pairs = {"downsamples": (False, True), "se_downsamples": (False,) * 2, "pos_embs": (None,) * 2}
    return FastVit(**sizes, **pairs, num_classes=5)  # type: ignore[arg-type]


REPARAMETRISED = {"RepVGG": lambda: byob("rep"), "MobileOne": lambda: byob("one"), "FastViT": fast_vit}


@pytest.mark.parametrize("build", REPARAMETRISED.values(), ids=REPARAMETRISED)
def test_methods_of_timm_still_work(build: Callable[[], Any]) -> None:
    model = randomise(build()).eval()
    inputs = torch.randn(2, 3, 32, 32)
    small: Any = nac.compress(model, inputs, width=0.5, calibration="none")
    assert small.num_features == model.num_features // 2
    assert len(list(small.modules())) == len(list(model.modules()))
    with torch.no_grad():
        fused = reparameterize_model(small)
        assert len(list(fused.modules())) < len(list(small.modules()))
        assert relative_error([fused(inputs)], [small(inputs)]) < 1e-5
        small.reset_classifier(3)
        assert small(inputs).shape == (2, 3)


def test_a_classifier_reads_what_is_made_last() -> None:
    """Other groups have the number of neurons that the classifier reads, and get other widths."""
    blocks = [["ir_r1_k3_s1_e3_c16"], ["ir_r1_k3_s1_e4_c16"], ["cn_r1_k1_s1_c48"]]
    model: Any = MobileNetV3(decode_arch_def(blocks), num_classes=5, num_features=64, norm_layer=nn.BatchNorm2d)
    inputs = torch.randn(2, 3, 16, 16)
    groups = record(model.eval(), inputs).groups
    assert sorted(group.size for group in groups) == [16, 48, 48, 64, 64]
    widths = {group.name: 10 + number for number, group in enumerate(groups)}
    small = halved(model, inputs, widths)
    assert (small.num_features, small.head_hidden_size) == (small.conv_head.in_channels, small.classifier.in_features)
    small.reset_classifier(3)
    assert small(inputs).shape == (2, 3)


class Inverted(nn.Module):
    """Reads and makes the same number of channels, and has the same number inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = self.mid_channels = self.in_dim = self.dim_out = dim
        self.up, self.down = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()).relu()


def test_names_and_places_tell_which_group_a_size_belongs_to() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), Inverted(16), nn.Conv2d(16, 3, 1))
    choices = first_guesses(model, IMAGES, {"0": 12, "1.up": 8, "1.down": 6})
    assert attributes(model, choices) == {("1", "in_dim"): 12, ("1", "mid_channels"): 8, ("1", "dim_out"): 6}
    assert stale(model, choices) == ["1.dim (16) may be the number of 0's channels and was left"]
    choices = first_guesses(model, IMAGES, {"0": 12, "1.up": 12, "1.down": 12})
    assert {path: value for (_, path), value in attributes(model, choices).items()} == {
        "dim": 12,
        "in_dim": 12,
        "mid_channels": 12,
        "dim_out": 12,
    }
    assert stale(model, choices) == []


def test_few_lines_name_what_was_left() -> None:
    class Several(Inverted):
        def __init__(self) -> None:
            super().__init__(16)
            self.channels = self.width = self.planes = self.features = 16

    model = nn.Sequential(nn.Conv2d(3, 16, 3), Several(), Several(), nn.Conv2d(16, 3, 1))
    lines = stale(model, first_guesses(model, IMAGES, {"0": 12, "1.up": 8, "2.up": 6}))
    assert lines[0] == "1.dim (16) may be the number of 0's channels and was left"
    assert lines[-1] == "and 2 more such attributes were left"
    assert len(lines) == 4


def test_what_is_a_size_by_its_value_only_is_named() -> None:
    class Keeps(OfTraining):
        def __init__(self) -> None:
            super().__init__()
            self.mystery, self.num_classes, self.kernel_size = 16, 16, 16

    model = Keeps()
    choices = first_guesses(model, VECTORS, {"first": 8})
    assert attributes(model, choices) == {("", "dim"): 8}
    assert stale(model, choices) == ["mystery (16) may be the number of first's channels and was left"]


class Heads(nn.Module):
    """Attention with more sizes than its number of heads."""

    def __init__(self, dim: int = 12, heads: int = 4, dim_head: int = 8) -> None:
        super().__init__()
        self.dim, self.heads, self.dim_head, self.all_head_size = dim, heads, dim_head, heads * dim_head
        self.qkv, self.out = nn.Linear(dim, 3 * heads * dim_head), nn.Linear(heads * dim_head, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, self.dim_head).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(y.reshape(b, t, self.all_head_size))


@pytest.mark.parametrize("heads", [4, 8])
def test_the_width_of_a_head_is_no_number_of_heads(heads: int) -> None:
    model, inputs = Heads(heads=heads), torch.randn(2, 5, 12)
    found = attributes(model, first_guesses(model, inputs, {"qkv": heads // 2}))
    assert found == {("", "heads"): heads // 2, ("", "all_head_size"): heads * 4}
    small = halved(model, inputs)
    assert (small.heads, small.dim_head, small.all_head_size, small.dim) == (heads // 2, 8, heads * 4, 12)


class Joined(nn.Module):
    """Reads two groups side by side, and keeps the sum of their sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(6, 32)
        self.reader = nn.Sequential(Reader(depth=0))
        self.reader[0].ch_in, self.reader[0].inside = 48, nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(torch.cat([self.a(x), self.b(x)], 1).relu())


def test_a_sum_of_sizes_follows() -> None:
    assert halved(Joined(), VECTORS, {"a": 12, "b": 8}).reader[0].ch_in == 20


@pytest.mark.parametrize("build", [fusible, OfTraining], ids=["blocks", "training"])
def test_the_original_keeps_its_sizes(build: Callable[[], nn.Module]) -> None:
    model = build()
    before = [repr(vars(module)) for module in model.modules()]
    nac.compress(model, IMAGES if build is fusible else VECTORS, width=0.5, calibration="none")
    assert [repr(vars(module)) for module in model.modules()] == before
