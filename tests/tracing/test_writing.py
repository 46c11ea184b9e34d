"""Values written into a part of a tensor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functional import Functional, around, left_alone, widths
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence

from nac_gpu.tracing.atoms import compact
from nac_gpu.tracing.rules import writing

STEPS = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))


def assigned(out: Tensor, step: int, state: Tensor) -> None:
    out[:, step] = state


def copied(out: Tensor, step: int, state: Tensor) -> None:
    out[:, step].copy_(state)


def added(out: Tensor, step: int, state: Tensor) -> None:
    out[:, step] += state


def indexed(out: Tensor, step: int, state: Tensor) -> None:
    out[:, torch.tensor([step])] = state[:, None]


def unbound(out: Tensor, step: int, state: Tensor) -> None:
    out.unbind(1)[step].copy_(state)


def transposed(out: Tensor, step: int, state: Tensor) -> None:
    out.transpose(1, 2)[:, :, step] = state


def flattened(out: Tensor, step: int, state: Tensor) -> None:
    out.view(len(out), -1)[:, step * state.shape[1] : (step + 1) * state.shape[1]] = state


def every_other(out: Tensor, step: int, state: Tensor) -> None:
    out[:, step::2] = state[:, None]


WAYS = [assigned, copied, added, indexed, unbound, transposed, flattened, every_other]


@pytest.mark.parametrize("write", WAYS)
def test_states_written_into_a_buffer(write: Callable[[Tensor, int, Tensor], None]) -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        x = model.make(x)
        out = x.new_zeros(x.shape[0], x.shape[1], len(model.state.weight))
        for step in range(x.shape[1]):
            write(out, step, model.state(x[:, step]).tanh())
        return model.read(out)

    layers = {"make": nn.Linear(6, 10), "state": nn.Linear(10, 8), "read": nn.Linear(8, 3)}
    assert widths(Functional(forward, **layers), STEPS) == {"make": 5, "state": 4}


def previous(x: Tensor) -> Tensor:
    """Each state read from where the one before it was written; nothing is written beforehand."""
    out = x.new_empty(x.shape)
    for step in range(x.shape[1]):
        out[:, step] = x[:, step].relu() + (out[:, step - 1] if step else 0)
    return out


def view_made_before(x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], 5, x.shape[2])
    view = out[:, 0]
    out[:, :2] = x[:, :2]
    return view


def base_written_after(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    view = out[:, 1:]
    out.copy_(x)
    return view


def shifted(x: Tensor) -> Tensor:
    """A quarter of the channels is taken from the step after, another from the one before."""
    fold, out = x.shape[2] // 4, torch.zeros_like(x)
    out[:, :-1, :fold] = x[:, 1:, :fold]
    out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
    out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
    return out


def constants(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 0
    x[:, 1] = torch.ones(())
    x[x < -2] = -2.0
    return x


def masked(x: Tensor) -> Tensor:
    x = x.clone()
    x[torch.tensor([[True, False, False, True], [False, True, False, False]])] = 0
    return x


def indexed_behind_channels(x: Tensor) -> Tensor:
    out = torch.zeros_like(x).mT.contiguous()
    out[:, :, torch.tensor([0, 2])] = x[:, :2].mT
    return out.mT


def indexed_on_both_sides(x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], x.shape[2], x.shape[1])
    out[torch.tensor([0, 1, 1]), :, torch.tensor([3, 0, 2])] = x[0, :3]
    return out.mT


def one_value_before(x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape)
    out[:, 3] = 1.0
    out[:, :3] = x[:, :3]
    return out


def padded(x: Tensor) -> Tensor:
    return pad_sequence([x[0, :3], x[1]], batch_first=True)


@pytest.mark.parametrize(
    "between",
    [
        *(previous, view_made_before, base_written_after, constants, masked, indexed_behind_channels),
        *(indexed_on_both_sides, one_value_before, padded),
    ],
)
def test_what_is_written_has_the_same_channels(between: Callable[[Tensor], Tensor]) -> None:
    assert widths(around(between), STEPS) == {"make": 4}


def test_channels_that_are_shifted_stay_in_their_parts() -> None:
    assert widths(around(shifted), STEPS) == {"make": 1, "make#2": 1, "make#3": 2}


def test_some_channels_overwritten_by_what_they_give() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        x, some = model.make(x).clone(), len(model.part.weight)
        x[:, :, :some] = model.part(x[:, :, :some])
        return model.read(x.relu())

    layers = {"make": nn.Linear(6, 8), "part": nn.Linear(4, 4), "read": nn.Linear(8, 3)}
    assert widths(Functional(forward, **layers), STEPS) == {"make": 2, "make#2": 2}


def test_a_learned_token_in_place_of_masked_ones() -> None:
    def forward(model: Any, x: Tensor, mask: Tensor) -> Tensor:
        x = model.make(x).clone()
        x[mask] = model.token.to(x)
        x[:, 0] = model.first
        return model.read(x)

    tokens = {"token": nn.Parameter(torch.randn(8)), "first": nn.Parameter(torch.randn(8))}
    model = Functional(forward, make=nn.Linear(6, 8), read=nn.Linear(8, 3), **tokens)
    mask = torch.tensor([[False, True, True, False], [False, False, False, True]])
    assert widths(model, (STEPS, mask)) == {"make": 4}


def beside_constants(x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape)
    out[:, 3] = torch.arange(x.shape[2], dtype=x.dtype)
    out[:, :3] = x[:, :3]
    return out


def over_constants(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = torch.arange(x.shape[2], dtype=x.dtype)
    return x


def indexed_over_constants(x: Tensor) -> Tensor:
    out = torch.arange(x.shape[2], dtype=x.dtype).repeat(2, 4, 1)
    out[:, torch.tensor([1, 2])] = x[:, :2]
    return out


@pytest.mark.parametrize("between", [beside_constants, over_constants, indexed_over_constants])
def test_constants_that_differ_between_channels_keep_them_apart(between: Callable[[Tensor], Tensor]) -> None:
    why = left_alone(around(between), STEPS)
    assert "values that differ between them" in why or "beside values that are not channels" in why


def test_a_part_of_the_channels_of_a_new_tensor_is_left_alone() -> None:
    def half(x: Tensor) -> Tensor:
        out = x.new_zeros(*x.shape[:2], 16)
        out[..., :8] = x
        return out

    assert "values are written in place" in left_alone(around(half, read=16), STEPS)


class Packed(nn.Module):
    """A layer, a recurrent network on packed sequences, and a layer for its states or for the last ones."""

    def __init__(self, kind: Any, *, sorted_: bool = True, last: bool = False, **options: Any) -> None:
        super().__init__()
        self.make, self.layers = nn.Linear(6, 10), kind(10, 8, **options)
        self.read = nn.Linear(16 if options.get("bidirectional") else 8, 3)
        self.lengths, self.sorted, self.last = torch.tensor([4, 2] if sorted_ else [2, 4]), sorted_, last

    def forward(self, x: Tensor) -> Tensor:
        first = self.layers.batch_first
        x = self.make(x if first else x.transpose(0, 1)).relu()
        packed = pack_padded_sequence(x, self.lengths, batch_first=first, enforce_sorted=self.sorted)
        states, last = self.layers(packed)
        if self.last:
            return self.read(torch.cat(list(last[-2:]), 1))
        return self.read(pad_packed_sequence(states, batch_first=first)[0])


@pytest.mark.parametrize(
    "model",
    [
        Packed(nn.LSTM, batch_first=True),
        Packed(nn.LSTM, num_layers=2, bidirectional=True),
        Packed(nn.GRU, sorted_=False, batch_first=True, bidirectional=True),
        Packed(nn.GRU, sorted_=False, last=True, bidirectional=True),
        Packed(nn.RNN, num_layers=2),
    ],
    ids=["lstm", "lstm_two_ways", "gru_unsorted", "gru_last", "rnn"],
)
def test_units_of_networks_on_packed_sequences(model: nn.Module) -> None:
    assert widths(model, STEPS) == {"make": 5, "layers.weight_ih_l0": 4}


def test_sequences_packed_from_a_list() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        x = model.make(x)
        return model.read(pad_packed_sequence(model.layers(pack_sequence([x[0], x[1, :3]]))[0])[0])

    layers = {"make": nn.Linear(6, 10), "layers": nn.GRU(10, 8), "read": nn.Linear(8, 3)}
    assert widths(Functional(forward, **layers), STEPS) == {"make": 5, "layers.weight_ih_l0": 4}


VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x[1:3],
    lambda x: x[:, 2],
    lambda x: x.transpose(0, 2)[1],
    lambda x: x[:, :, 1:].permute(2, 0, 1),
    lambda x: x.view(3, 20)[:, 3:8],
    lambda x: x.view(-1)[7:19],
    lambda x: x[:, ::2],
    lambda x: x[0].diagonal(),
    lambda x: x.unsqueeze(1)[:, :, 3],
]


@pytest.mark.parametrize("number", range(len(VIEWS)))
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "permuted"])
def test_planes_of_views_are_those_of_the_memory_that_they_show(number: int, last: bool) -> None:
    base = torch.zeros(3, 4, 5)
    if last:
        base = torch.zeros(5, 3, 4).permute(1, 2, 0).clone(memory_format=torch.preserve_format)
    try:
        view = VIEWS[number](base)
    except RuntimeError:  # this base cannot be viewed so
        return
    block = writing._corner(view, base)
    if block is None:  # it is read through memory
        return
    for sizes in ((1, 1, 5), (3, 4, 1), (3, 4, 5)):
        plane = torch.arange(torch.Size(sizes).numel()).reshape(sizes)
        direct = compact(writing._part(plane, view, *block))
        through = compact(writing._through(view, base, plane)[1])
        assert direct is not None
        assert through is not None
        assert torch.equal(direct, through)
