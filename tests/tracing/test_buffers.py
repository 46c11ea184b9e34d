"""Buffers with one value per channel merge with the channels; masks, tables and kernels do not keep them apart."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import transformers
from plans import prepared
from torch import Tensor, nn
from torch.nn import functional as F

import nac_gpu as nac
from common.checks import compressible_share
from nac_gpu.testing import check_copies, merge_copies, randomise
from nac_gpu.tracing.trace import record

Between = Callable[["Net", Tensor], Tensor]
WIDTH = 12


class Net(nn.Module):
    """Two layers, with buffers of several shapes that a function uses in between."""

    scale: Tensor
    shift: Tensor
    halves: Tensor
    table: Tensor
    image: Tensor
    matrix: Tensor
    blur: Tensor
    kernels: Tensor
    filters: Tensor

    def __init__(self, between: Between, read: int = WIDTH) -> None:
        super().__init__()
        self.between = between
        self.make, self.read = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(read, 4, 1)
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.plain = torch.rand(WIDTH)
        self.channels = WIDTH
        self.register_buffer("scale", torch.rand(WIDTH) + 0.5)
        self.register_buffer("shift", torch.randn(WIDTH), persistent=False)
        self.register_buffer("halves", torch.rand(WIDTH // 2))
        self.register_buffer("table", torch.randn(5, WIDTH))
        self.register_buffer("image", torch.randn(1, WIDTH, 6, 6))
        self.register_buffer("matrix", torch.randn(WIDTH, WIDTH))
        self.register_buffer("blur", torch.rand(1, 1, 3, 3))
        self.register_buffer("kernels", torch.rand(WIDTH, 1, 3, 3))
        self.register_buffer("filters", torch.randn(4, 1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.between(self, self.make(x)).relu())


def each(values: Tensor) -> Tensor:
    return values[:, None, None]


def net(between: Between, read: int = WIDTH) -> Net:
    torch.manual_seed(0)
    return Net(between, read).eval()


INPUTS = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))

MERGING: dict[str, tuple[Between, set[str]]] = {
    "scale": (lambda s, x: x * each(s.scale), {"scale"}),
    "scale_and_shift": (lambda s, x: (x - each(s.shift)) / each(s.scale), {"scale", "shift"}),
    "computed": (lambda s, x: x * each(s.gain * (s.scale + 1e-3).rsqrt()), {"scale"}),
    "written_in_place": (lambda s, x: x.mul_(each((s.scale * 2).add_(1).sqrt_())), {"scale"}),
    "mask": (lambda s, x: x.masked_fill(each(s.scale) > 1, 0.0), {"scale"}),
    "where": (lambda s, x: torch.where(each(s.scale) > 1, x, torch.zeros_like(x)), {"scale"}),
    "image": (lambda s, x: x + s.image, {"image"}),
    "row_of_a_table": (lambda s, x: x + each(s.table[2]), {"table"}),
    "looked_up": (lambda s, x: x + s.table[torch.tensor([1, 3])][:, :, None, None], {"table"}),
    "flipped": (lambda s, x: x * each(s.scale.flip(0)), {"scale"}),
    "joined": (lambda s, x: torch.cat([x, s.image.expand(2, -1, -1, -1)])[:2] * 1.5, {"image"}),
    "batch_norm": (lambda s, x: F.batch_norm(x, s.shift, s.scale), {"scale", "shift"}),
    "batch_norm_of_two": (lambda s, x: F.batch_norm(x, s.shift, s.scale, s.scale, s.shift), {"scale", "shift"}),
    "prelu": (lambda s, x: F.prelu(x, s.scale), {"scale"}),
}


@pytest.mark.parametrize("name", MERGING)
def test_a_buffer_merges_with_the_channels_that_it_meets(name: str) -> None:
    between, wanted = MERGING[name]
    plan = prepared(net(between), INPUTS)
    (group,) = plan.groups
    assert group.size == WIDTH
    assert {m.tensor for m in group.members if m.role == "mean"} - {"make.weight", "make.bias", "gain"} == wanted
    assert merge_copies(plan.model, INPUTS, plan.choices).error < 1e-8


def test_channels_that_share_a_value_of_a_buffer_merge_in_step() -> None:
    plan = prepared(net(lambda s, x: x * each(torch.cat([s.halves, s.halves]))), INPUTS)
    (group,) = plan.groups
    assert group.size == WIDTH // 2
    assert merge_copies(plan.model, INPUTS, plan.choices).error < 1e-8


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda s, x: x * each(s.plain.to(x)), "channels meet values that differ between them"),
        (lambda s, x: x * each(s.scale > 1).to(torch.int8).cumsum(0), "cumsum is taken over channels"),
        (lambda s, x: x * each(s.matrix @ s.scale), "channels meet values that differ between them"),
        (lambda s, x: x * each(s.scale / s.scale.mean()), "mean is taken over channels"),
        (lambda s, x: x * each(s.scale.roll(1)), "channels are moved by a fixed number of places"),
        (lambda s, x: x * each(s.scale * torch.arange(12.0)), "channels meet values that differ between them"),
        (lambda s, x: x * (s.scale[:, None, None] * torch.arange(6.0)).cos(), "channels meet values that differ"),
        (lambda s, x: x * each(s.scale) + (s.scale @ s.matrix)[0], "a buffer is read by"),
        (lambda s, x: x * each(s.scale.mul_(1)), "values are written in place"),
        (lambda s, x: x * each(s.shift.copy_(x.mean((0, 2, 3)))), "values are written in place"),
    ],
    ids=["attribute", "counted", "product", "mean", "roll", "numbered", "angles", "read_too", "written", "kept"],
)
def test_what_else_is_done_with_a_buffer_keeps_channels_apart(between: Between, reason: str) -> None:
    alone = {found.layer: found for found in record(net(between), INPUTS).left_alone}
    assert reason in alone["make"].reason


def test_a_constant_that_is_no_buffer_is_told_how_to_become_one() -> None:
    (alone, _) = record(net(lambda s, x: x * each(s.plain.to(x))), INPUTS).left_alone
    assert alone.remedy is not None
    assert "register_buffer" in alone.remedy


def test_a_buffer_that_is_an_output_keeps_its_size() -> None:
    class Tells(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(x), self.scale

    torch.manual_seed(0)
    graph = record(Tells(lambda s, x: x * each(s.scale)), INPUTS)
    assert [(found.layer, found.reason) for found in graph.left_alone] == [
        ("make", "model output"),
        ("read", "model output"),
    ]


def test_tables_of_positions_and_masks_are_no_channels() -> None:
    """Scores get a mask, tokens their positions: only the dimension of the channels merges."""

    class Tokens(nn.Module):
        mask: Tensor
        positions: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.down, self.head = (
                nn.Linear(4, 8),
                nn.Linear(8, 10),
                nn.Linear(10, 8),
                nn.Linear(8, 3),
            )
            self.register_buffer("mask", torch.full((5, 5), float("-inf")).triu(1))
            self.register_buffer("positions", torch.randn(9, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x) + self.positions[: x.shape[1]]
            x = (x @ x.mT / 9 + self.mask).softmax(-1) @ self.down(self.up(x).relu())
            return self.head(x)

    torch.manual_seed(0)
    model, inputs = Tokens().eval(), torch.randn(2, 5, 4)
    plan = prepared(model, inputs)
    members = {(m.tensor, m.dim) for group in plan.groups for m in group.members}
    assert ("mask", 0) not in members
    assert ("mask", 1) not in members
    assert ("positions", 0) not in members
    assert {group.name for group in plan.groups} == {"up", "down"}
    assert merge_copies(plan.model, inputs, plan.choices).error < 1e-8


def test_a_divisor_of_dropped_channels_is_not_zero() -> None:
    """Later layers are refitted on the network whose dropped channels are still there."""

    class Divided(Net):
        def __init__(self) -> None:
            super().__init__(lambda s, x: x / each(s.scale))
            self.more = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.more(super().forward(x))

    torch.manual_seed(0)
    model = Divided().eval()
    small = nac.compress(model, INPUTS, width=0.5, calibration=[INPUTS], refine=False)
    assert bool(small(INPUTS).isfinite().all())
    pruned = nac.compress(model, INPUTS, width=0.5, calibration=[INPUTS], method="l1", refine=False)
    assert bool(pruned(INPUTS).isfinite().all())


def with_statistics(model: nn.Module) -> nn.Module:
    """Random statistics in all frozen BatchNorms."""
    generator = torch.Generator().manual_seed(0)
    for module in randomise(model).modules():
        if "Frozen" in type(module).__name__:
            for name in ("weight", "bias", "running_mean", "running_var"):
                buffer = module.get_buffer(name)
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()


def detr() -> nn.Module:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    sizes = dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "d_model"], 16)
    counts = dict.fromkeys(["encoder_layers", "decoder_layers"], 1)
    heads = dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2)
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone_config=backbone, backbone=None, num_queries=5, **sizes, **counts, **heads
    )
    return transformers.DetrModel(config).backbone


FROZEN: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "torchvision": (
        lambda: torchvision.models.ResNet(
            torchvision.models.resnet.BasicBlock,
            [1, 1, 1, 1],
            num_classes=3,
            norm_layer=torchvision.ops.FrozenBatchNorm2d,
        ),
        (torch.randn(1, 3, 32, 32),),
    ),
    "timm": (
        lambda: timm.layers.freeze_batch_norm_2d(timm.create_model("mobilenetv3_small_050", num_classes=3)),
        (torch.randn(1, 3, 32, 32),),
    ),
    "transformers": (detr, (torch.randn(1, 3, 32, 32), torch.ones(1, 32, 32))),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_batch_norms_merge(name: str, tmp_path: Path) -> None:
    build, inputs = FROZEN[name]
    torch.manual_seed(0)
    model = with_statistics(build())
    plan = prepared(model, inputs)
    assert compressible_share(plan.model, plan.groups) > 0.95
    assert merge_copies(plan.model, inputs, plan.choices).error < 1e-8
    small = nac.compress(model, inputs, width=0.5, method="random", calibration="none")
    assert nac.cost(small, inputs) == plan.plan.after
    for module in small.modules():
        if "Frozen" in type(module).__name__:
            assert len({len(buffer) for buffer in module.buffers()}) == 1
            assert getattr(module, "num_features", len(module.get_buffer("bias"))) == len(module.get_buffer("bias"))
    nac.save(small, tmp_path / "small.safetensors")
    loaded = nac.load(tmp_path / "small.safetensors", build)
    assert {n: b.shape for n, b in loaded.named_buffers()} == {n: b.shape for n, b in small.named_buffers()}


def written_filter(s: Net, x: Tensor) -> Tensor:
    """A filter that is written into the code, in the dtype of the images."""
    kernel = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype)
    kernel = (kernel[:, None] * kernel)[None].repeat(x.shape[1], 1, 1)
    return F.conv2d(x, kernel.unsqueeze(1), groups=x.shape[1])


def on_one_channel(s: Net, x: Tensor) -> Tensor:
    """The kernel's own dimension is expanded, as some libraries of filters do."""
    kernel = s.blur.expand(1, x.shape[1], 3, 3).reshape(-1, 1, 3, 3)
    return F.conv2d(F.pad(x, [1] * 4, mode="reflect"), kernel, groups=len(kernel))


BLURS: dict[str, tuple[Between, int]] = {
    "expanded": (lambda s, x: F.conv2d(x, s.blur.expand(x.shape[1], 1, 3, 3), groups=x.shape[1]), WIDTH),
    "repeated": (lambda s, x: F.conv2d(x, s.blur.repeat(x.shape[1], 1, 1, 1) / 9, groups=x.shape[1]), WIDTH),
    "written": (written_filter, WIDTH),
    "flattened": (on_one_channel, WIDTH),
    "one_for_each": (lambda s, x: F.conv2d(x, s.kernels, s.shift, groups=x.shape[1]), WIDTH),
    "groups_kept": (lambda s, x: F.conv2d(x, s.kernels, groups=s.channels), WIDTH),
    "transposed": (lambda s, x: F.conv_transpose2d(x, s.kernels, stride=2, groups=x.shape[1]), WIDTH),
    "wavelets": (
        lambda s, x: F.conv2d(x, s.filters.repeat(x.shape[1], 1, 1, 1), stride=2, groups=x.shape[1]),
        4 * WIDTH,
    ),
}


@pytest.mark.parametrize("name", BLURS)
def test_fixed_depthwise_filters_let_channels_pass(name: str) -> None:
    between, read = BLURS[name]
    plan = prepared(net(between, read), INPUTS)
    (group,) = plan.groups
    assert group.size == WIDTH
    own = {m.tensor for m in group.members} & {"kernels", "filters", "blur", "shift"}
    assert own == {"one_for_each": {"kernels", "shift"}, "groups_kept": {"kernels"}, "transposed": {"kernels"}}.get(
        name, set()
    )
    assert merge_copies(plan.model, INPUTS, plan.choices).error < 1e-8


def test_a_filter_that_mixes_channels_keeps_them_apart() -> None:
    found = {
        a.layer: a.reason for a in record(net(lambda s, x: F.conv2d(x, s.matrix[:, :, None, None])), INPUTS).left_alone
    }
    assert "a convolution's kernel is not a parameter" in found["make"]


def test_a_network_with_blurred_strides_merges_as_a_whole() -> None:
    torch.manual_seed(0)
    model = timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock,
        [1, 1, 1, 1],
        num_classes=3,
        aa_layer=timm.layers.BlurPool2d,
        channels=(8, 12, 16, 20),
    )
    model, inputs = randomise(model).eval(), torch.randn(1, 3, 32, 32)
    plan = prepared(model, inputs)
    assert compressible_share(plan.model, plan.groups) > 0.99
    assert check_copies(model, inputs).error < 1e-8
