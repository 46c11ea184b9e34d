"""The record: groups, what is left alone and why, and that nothing of the model changes."""

from collections.abc import Callable

import pytest
import torch
from networks import Conv1dNet, NormedMLP, Residual, Split, network
from torch import Tensor, nn
from torch.nn import functional as F

from nac_gpu.network.running import evaluating
from nac_gpu.tracing.trace import record


class Net(nn.Module):
    """Two layers with something in between."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 8, read: int | None = None) -> None:
        super().__init__()
        self.make = nn.Conv2d(3, width, 3, padding=1)
        self.read = nn.Conv2d(read or width, 4, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.between(self.make(x)))


def reasons(model: nn.Module, *shape: int) -> dict[str, str]:
    return {alone.layer: alone.reason for alone in record(model, torch.randn(*shape)).left_alone}


def test_groups_follow_the_forward_pass_not_the_module_order() -> None:
    graph = record(Conv1dNet(), torch.randn(2, 5, 9))
    assert [(g.name, g.size) for g in graph.groups] == [("first", 12), ("second", 9)]
    assert [(a.layer, a.size, a.reason) for a in graph.left_alone] == [("head", 4, "model output")]


def test_members_and_roles_of_a_group() -> None:
    group = record(Conv1dNet(), torch.randn(2, 5, 9)).groups[1]
    members = {(m.tensor, m.dim): m.role for m in group.members}
    assert members == {
        ("second.weight", 0): "mean",
        ("second.bias", 0): "mean",
        ("norm.weight", 0): "mean",
        ("norm.bias", 0): "mean",
        ("norm.running_mean", 0): "mean",
        ("norm.running_var", 0): "mean",
        ("head.weight", 1): "sum",
    }
    (producer,) = group.producers
    assert producer.layer == "second"
    assert producer.bias == "second.bias"
    assert producer.norm is not None
    assert producer.norm.mean == "norm.running_mean"
    assert producer.norm.eps == 1e-5
    assert group.norms == ()


def test_a_flattened_channel_is_a_block_of_columns() -> None:
    group = record(network("cnn")[0], torch.randn(1, 1, 28, 28)).groups[4]
    member = next(m for m in group.members if m.role == "sum")
    assert member.index.shape == (120, 9)
    assert torch.equal(member.index, torch.arange(120 * 9).reshape(120, 9))


def test_a_residual_stream_is_one_group_with_all_it_touches() -> None:
    graph = record(Residual(), torch.randn(1, 3, 8, 8))
    (group,) = graph.groups
    assert group.layers == ("stem", "block", "depthwise")
    assert {m.tensor for m in group.members} >= {"act.weight", "block.weight", "head.weight", "depthwise.weight"}
    head = next(m for m in group.members if m.tensor == "head.weight")
    assert head.index.tolist() == [[i, i + 10] for i in range(10)]


def test_batchnorm_is_folded_only_where_it_alone_reads_the_bare_result() -> None:
    folded, free = record(NormedMLP(), torch.randn(4, 7)).groups
    assert folded.producers[0].norm is not None
    assert free.producers[0].norm is None
    assert [norm.weight for norm in free.norms] == ["after.weight"]


class ReadsTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.make, self.norm, self.read = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.make(x)
        return self.read(self.norm(x) + x)


def test_a_bare_result_that_something_else_reads_too_is_not_folded() -> None:
    (group,) = record(ReadsTwice(), torch.randn(3, 4)).groups
    assert group.producers[0].norm is None
    assert len(group.norms) == 1


def test_one_of_every_few_channels_is_picked_in_step_with_the_others() -> None:
    """Even channels and odd ones, say: those that alternate are one neuron."""
    (group,) = record(Net(lambda x: torch.cat([x[:, 1::2], x[:, ::2]], 1)), torch.randn(1, 3, 6, 6)).groups
    assert group.size == 4
    assert {(m.tensor, m.dim): m.index.tolist() for m in group.members} == {
        ("make.weight", 0): [[0, 1], [2, 3], [4, 5], [6, 7]],
        ("make.bias", 0): [[0, 1], [2, 3], [4, 5], [6, 7]],
        ("read.weight", 1): [[0, 4], [1, 5], [2, 6], [3, 7]],
    }


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda x: F.softmax(x, 1), "softmax is taken over channels in Net"),
        (lambda x: x.cumsum(1), "cumsum is taken over channels in Net"),
        (lambda x: x - x.mean(1, keepdim=True), "mean is taken over channels in Net"),
        (lambda x: x + torch.arange(8.0).view(1, 8, 1, 1), "values that differ between them"),
        (lambda x: torch.einsum("nchw,cd->ndhw", x, torch.eye(8)), "multiplied by values that are not a parameter"),
        (lambda x: F.layer_norm(x, x.shape[1:]), "normalised over channels in Net"),
        (lambda x: F.group_norm(x, 1), "normalised over channels in Net"),
        (lambda x: x.view(-1, 2, 4, 6, 6).sum((1, 2))[:, None].repeat(1, 8, 1, 1), "sum is taken over channels in Net"),
        (lambda x: x.roll(3, 1), "channels are moved by a fixed number of places in Net"),
        (lambda x: torch.cat([x[:, ::3], x[:, :5]], 1), "channels are moved by a fixed number of places in Net"),
        (lambda x: x[:, [3, 1, 0, 2, 4, 5, 6, 7]], "channels are picked by index in Net"),
        (lambda x: x[:, :1] + x[:, 1:].sum(1, keepdim=True) + x, "sum is taken over channels in Net"),
        (lambda x: torch.cdist(x, x)[..., :6] + x, "operation _cdist_forward is not known"),
        (lambda x: torch.fft.fft(x, dim=1).abs(), "fft_r2c is taken over channels in Net"),
        (lambda x: x.movedim(1, 3).tril().movedim(3, 1), "tril is taken over channels in Net"),
        (lambda x: torch.zeros(1, 16, 6, 6)[:, :8].copy_(x), "values are written in place"),
        (lambda x: torch.zeros(1, 16, 6, 6)[:, :8].add_(x), "values are written in place"),
        (lambda x: F.conv2d(x, torch.rand(8, 1, 1, 1), groups=8), "a convolution's kernel is not a parameter"),
        (lambda x: x + F.conv2d(x[:, :, :1, :1], x.flip(1).expand(8, 8, 6, 6)[:, :, :1, :1]), "not a parameter"),
        (lambda x: (x.flatten(2).mT @ x.flatten(2)).sum() + x, "multiplied by values that are not a parameter"),
        (lambda x: torch.cat([x, torch.rand(1, 8, 6, 6)], 0).sum(0, keepdim=True), "joined with values that are not"),
        (lambda x: F.batch_norm(x, torch.zeros(8), torch.ones(8)), "a normalisation's parameters are computed"),
        (
            lambda x: F.max_pool1d(x.flatten(2).mT, 2, padding=0).repeat(1, 1, 2).mT.unflatten(2, (6, 6)),
            "over channels",
        ),
    ],
    ids=[
        *("softmax", "cumsum", "mean", "constant", "matrix", "layernorm", "groupnorm", "regroup", "roll", "stride"),
        *("pick", "first", "unknown", "fourier", "triangle", "copy"),
        *("add_to_view", "kernel", "made_kernel", "attention", "join", "computed_norm", "pooled"),
    ],
)
def test_what_mixes_channels_is_left_alone_with_the_reason(between: Callable[[Tensor], Tensor], reason: str) -> None:
    found = reasons(Net(between), 1, 3, 6, 6)
    assert reason in found["make"]


@pytest.mark.parametrize(
    "between",
    [
        lambda x: F.softmax(x, 2),
        lambda x: x.cumsum(3).abs().sqrt(),
        lambda x: x.flip(1).roll(3, 2),
        lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
        lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
        lambda x: F.interpolate(F.adaptive_avg_pool2d(x, 2), scale_factor=3),
        lambda x: torch.where(x > 0, x, torch.zeros_like(x)).clamp_(max=3),
        lambda x: x.flatten(2).transpose(1, 2).contiguous().mT.unflatten(2, (6, 6)),
        lambda x: x.add_(1).mul_(2).relu_(),
        lambda x: torch.stack([x, 2 * x]).amax(0),
        lambda x: torch.bmm(x[0], x[0].mT)[None] * 1.0,
        lambda x: torch.zeros_like(x).copy_(x),
    ],
    ids=[
        *("softmax", "cumsum", "flip", "index", "gate", "resample", "where", "transpose", "in_place", "stack"),
        *("batched", "copy"),
    ],
)
def test_what_keeps_channels_apart_is_a_group(between: Callable[[Tensor], Tensor]) -> None:
    graph = record(Net(between), torch.randn(1, 3, 6, 6))
    assert [(g.name, g.size) for g in graph.groups] == [("make", 8)]


def test_split_channels_with_different_readers_are_different_groups() -> None:
    graph = record(Split(), torch.randn(2, 4))
    assert [(g.name, g.size) for g in graph.groups] == [("make", 6), ("make#2", 4)]


def test_tied_weights_that_make_and_read_are_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.code = nn.Linear(6, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.code(F.linear(self.code(x), self.code.weight.t())), self.code.weight.t())

    found = {(alone.size, alone.reason) for alone in record(Tied(), torch.randn(2, 6)).left_alone}
    assert found == {
        (5, "its weight both makes and reads these channels"),
        (6, "reads values that are not channels in code"),
    }


def test_channels_that_nothing_reads() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aux, self.out = nn.Linear(3, 5), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.aux(x)
            return self.out(x)

    assert reasons(Unread(), 2, 3) == {"aux": "nothing reads these channels", "out": "model output"}


def test_the_model_is_as_it_was_also_when_the_pass_fails() -> None:
    model, inputs = network("normed_mlp")
    model.train()
    model.norm.eval()  # type: ignore[union-attr]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    wrong = torch.randn(2, 3)
    random_state = torch.get_rng_state()
    record(model, inputs)
    with pytest.raises(RuntimeError):
        record(model, wrong)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_failing_pass_names_the_module_and_keeps_the_cause() -> None:
    model, _ = network("cnn")
    with pytest.raises(
        RuntimeError, match=r"do not fit the forward pass: 0 raised RuntimeError.*got \(1, 2, 28, 28\)"
    ) as e:
        record(model, torch.randn(1, 2, 28, 28))
    assert isinstance(e.value.__cause__, RuntimeError)


def test_inputs_as_sequence_and_mapping() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 7), nn.Linear(7, 2)

        def forward(self, x: Tensor, scale: Tensor, *, shift: float = 0.0) -> dict[str, Tensor]:
            return {"y": self.b(self.a(x).relu() * scale + shift)}

    x, scale = torch.randn(2, 3), torch.tensor(2.0)
    for inputs in ((x, scale), {"x": x, "scale": scale, "shift": 1.0}):
        assert [g.name for g in record(Two(), inputs).groups] == ["a"]


def test_evaluating_restores_every_mode() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model[1].eval()
    with evaluating(model):
        assert not model.training
        assert not torch.is_grad_enabled()
    assert [model.training, model[0].training, model[1].training] == [True, True, False]


def test_channels_used_as_indices_are_left_alone() -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.table, self.out = nn.Linear(4, 6), nn.Embedding(9, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.table(self.make(x).abs().clamp(max=8).long()))

    graph = record(Indexed(), torch.randn(2, 4))
    assert [g.name for g in graph.groups] == ["table"]
    assert graph.left_alone[0].reason == "channels are used as indices in table"


def test_reading_other_numbers_from_the_bits_is_not_movement() -> None:
    found = reasons(Net(lambda x: x.view(torch.int32).view(torch.float32) * 1.0), 1, 3, 6, 6)
    assert "operation view is not known" in found["make"]


def test_heads_of_attention_are_units() -> None:
    graph = record(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(2, 5, 8))
    assert [(g.name, g.size, g.units) for g in graph.groups] == [
        ("self_attn.in_proj_weight", 2, ("self_attn",)),
        ("linear1", 16, ()),
    ]


def test_normalised_inputs_are_not_channels() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    assert [g.name for g in record(model, torch.randn(2, 3, 4, 4)).groups] == ["1"]


def test_transposed_convolutions_and_matrix_vector_products() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.read = nn.ConvTranspose2d(3, 8, 2, stride=2), nn.Conv2d(8, 6, 1)
            self.out = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.mv(self.read(self.up(x).relu()).mean((2, 3)), self.out)

    graph = record(Decoder(), torch.randn(2, 3, 4, 4))
    assert [(g.name, g.size) for g in graph.groups] == [("up", 8), ("read", 6)]


def test_shuffled_channels_merge_in_step() -> None:
    """However a shuffle is read, its two halves keep the same order."""
    graph = record(Net(lambda x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)), torch.randn(1, 3, 6, 6))
    (group,) = graph.groups
    members = {(m.tensor, m.dim): m.index.tolist() for m in group.members}
    assert members["make.weight", 0] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert members["read.weight", 1] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_groups_of_a_convolution_merge_in_step_or_as_units() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, groups=2), nn.Conv2d(4, 5, 1))
    graph = record(layers, torch.randn(1, 3, 4, 4))
    assert [(g.name, g.size, g.units) for g in graph.groups] == [("0", 4, ()), ("1", 2, ())]
    members = {(m.tensor, m.dim): m.index.tolist() for m in graph.groups[0].members}
    assert members["0.weight", 0] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert members["1.weight", 1] == [[0], [1], [2], [3]]
    depthwise = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1, groups=4), nn.Conv2d(8, 5, 1))
    (group,) = record(depthwise, torch.randn(1, 3, 4, 4)).groups
    assert group.size == 4
    norm = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 5, 1))
    (group,) = record(norm, torch.randn(1, 3, 4, 4)).groups
    assert (group.size, group.units) == (4, ("1",))


def test_an_average_over_heads_keeps_them_apart_only_if_somebody_reads_it() -> None:
    class Attends(nn.Module):
        def __init__(self, returned: bool) -> None:
            super().__init__()
            self.attention, self.out, self.returned = nn.MultiheadAttention(8, 4), nn.Linear(8, 2), returned

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y, weights = self.attention(x, x, x)
            return (self.out(y), weights) if self.returned else (self.out(y),)

    found = [
        [g.name for g in record(Attends(returned), torch.randn(5, 2, 8)).groups if g.units]
        for returned in (False, True)
    ]
    assert found == [["attention.in_proj_weight"], []]


def test_parts_of_the_channels_that_go_other_ways_are_other_groups() -> None:
    """However the parts are read: a neuron of one merged with one of the other would have to do both."""

    def halves(x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return torch.cat([x[:, :half].relu(), x[:, half:]], 1)

    graph = record(Net(halves), torch.randn(1, 3, 6, 6))
    assert [g.members[0].index.flatten().tolist() for g in graph.groups] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_unequal_parts_of_a_split_are_other_groups() -> None:
    def split(x: Tensor) -> Tensor:
        first, second = x.split(5, 1)
        return torch.cat([first.relu(), second], 1)

    graph = record(Net(split), torch.randn(1, 3, 6, 6))
    assert [g.size for g in graph.groups] == [5, 3]


def test_units_of_equal_parts_are_other_groups() -> None:
    def halves(x: Tensor) -> Tensor:
        first, second = F.group_norm(x, 4).chunk(2, 1)
        return torch.cat([first.relu(), second.tanh()], 1)

    graph = record(Net(halves), torch.randn(1, 3, 6, 6))
    assert [(g.size, g.producers[0].member.index.tolist()) for g in graph.groups] == [
        (2, [[0, 1], [2, 3]]),
        (2, [[4, 5], [6, 7]]),
    ]


def test_rolling_all_values_at_once_moves_channels() -> None:
    found = reasons(Net(lambda x: x.roll(1)), 1, 3, 6, 6)
    assert "channels are moved by a fixed number of places" in found["make"]
