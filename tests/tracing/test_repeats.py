"""Masks keep heads apart if they may differ between heads, and not if one mask is repeated for all of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functional import Functional, widths
from torch import Tensor, nn
from torch.nn import functional as F

from nac_gpu.tracing.trace import record


def tokens(batch: int, width: int = 16) -> Tensor:
    return torch.randn(batch, 5, width, generator=torch.Generator().manual_seed(1))


def padding(batch: int, kind: str) -> Tensor:
    """None of five tokens, the last of them, or all to some degree."""
    if kind == "degrees":
        return torch.randn(batch, 5, generator=torch.Generator().manual_seed(2))
    return (torch.arange(5) > (2 if kind == "last" else 5)).repeat(batch, 1)


class Encoder(nn.Module):
    """One of PyTorch's encoders, with masks."""

    def __init__(self, need_weights: bool | None = None) -> None:
        super().__init__()
        self.need_weights = need_weights
        if need_weights is None:
            layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
            self.layers: nn.Module = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        else:
            self.layers = nn.MultiheadAttention(16, 4, batch_first=True)
        self.read = nn.Linear(16, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if self.need_weights is None:
            return self.read(self.layers(x, mask, padding))
        options = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": self.need_weights}
        return self.read(self.layers(x, x, x, **options)[0])


def heads(model: nn.Module, inputs: Any) -> list[int]:
    return [group.size for group in record(model.eval(), inputs).groups if group.units]


@pytest.mark.parametrize("need_weights", [None, False, True], ids=["layer", "attention", "weights"])
@pytest.mark.parametrize("kind", ["last", "degrees"])
def test_a_padding_mask_keeps_no_heads_apart_whatever_the_batch(kind: str, need_weights: bool | None) -> None:
    for batch in (1, 2):
        assert heads(Encoder(need_weights), (tokens(batch), padding(batch, kind))) == [4]
        causal = torch.randn(5, 5) if kind == "degrees" else torch.ones(5, 5, dtype=torch.bool).triu(1)
        assert heads(Encoder(need_weights), (tokens(batch), padding(batch, kind), causal)) == [4]
        assert heads(Encoder(need_weights), (tokens(batch), None, causal)) == [4]


@pytest.mark.parametrize("need_weights", [None, True], ids=["layer", "weights"])
def test_heads_with_masks_merge_exactly(need_weights: bool | None) -> None:
    inputs = (tokens(2), padding(2, "last"), torch.ones(5, 5, dtype=torch.bool).triu(1))
    assert 2 in widths(Encoder(need_weights), inputs).values()


@pytest.mark.parametrize("batch", [1, 2])
def test_a_mask_for_each_head_keeps_them_apart_though_it_is_zero_now(batch: int) -> None:
    for mask in (torch.zeros(4 * batch, 5, 5), torch.zeros(4 * batch, 5, 5, dtype=torch.bool)):
        assert heads(Encoder(False), (tokens(batch), None, mask)) == []
        assert heads(Encoder(True), (tokens(batch), padding(batch, "none"), mask.bool())) == []


Masks = Callable[[Tensor, int], Tensor]
#: From a mask [batch, 5, 5] to one [batch x heads, 5, 5] with the same values for all heads.
REPEATED: dict[str, Masks] = {
    "interleaved": lambda mask, n: mask.repeat_interleave(n, 0),
    "expanded": lambda mask, n: mask[:, None].expand(-1, n, -1, -1).reshape(-1, 5, 5),
    "stacked": lambda mask, n: torch.stack([mask] * n, 1).flatten(0, 1),
    "indexed": lambda mask, n: mask[torch.arange(len(mask)).repeat_interleave(n)],
    "computed": lambda mask, n: torch.where(mask.repeat_interleave(n, 0) > 0, 0.0, -1e4).to(mask) * 2,
    "padded": lambda mask, n: F.pad(mask.repeat_interleave(n, 0)[:, 1:], (0, 0, 1, 0), value=1.0),
    "written": lambda mask, n: written(mask, n),
}
#: The same, with values that may differ between heads.
DIFFERENT: dict[str, Masks] = {
    "slopes": lambda mask, n: (mask[:, None] * torch.arange(n).to(mask)[:, None, None]).flatten(0, 1),
    "added": lambda mask, n: mask.repeat_interleave(n, 0) + torch.zeros(len(mask) * n, 1, 1).cumsum(0).to(mask),
    "one_more": lambda mask, n: one_head_more(mask, n),
    "padded": lambda mask, n: F.pad(mask[:, None].expand(-1, n - 1, -1, -1), (0, 0, 0, 0, 1, 0)).flatten(0, 1),
}


def written(mask: Tensor, heads: int) -> Tensor:
    out = mask.new_zeros(len(mask), heads, 5, 5)
    for number in range(len(mask)):
        out[number, :, :, 3:] = mask[number, :, 3:]
    return out.flatten(0, 1)


def one_head_more(mask: Tensor, heads: int) -> Tensor:
    out = mask.new_zeros(len(mask), heads, 5, 5)
    out[:, 1] = 1.0
    return out.flatten(0, 1)


def masked(repeated: Masks) -> nn.Module:
    """Attention with a mask that the model itself repeats for its heads."""

    def forward(model: Any, x: Tensor, mask: Tensor) -> Tensor:
        mask = repeated(mask, model.attention.num_heads)
        return model.read(model.attention(x, x, x, attn_mask=mask)[0])

    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    return Functional(forward, attention=attention, read=nn.Linear(16, 3))


@pytest.mark.parametrize("how", REPEATED)
def test_a_mask_repeated_for_all_heads(how: str) -> None:
    mask = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(1))
    assert widths(masked(REPEATED[how]), (tokens(2), mask))["attention.in_proj_weight"] == 2


@pytest.mark.parametrize("how", DIFFERENT)
def test_masks_that_differ_between_heads(how: str) -> None:
    assert heads(masked(DIFFERENT[how]), (tokens(2), torch.rand(2, 5, 5))) == []


@pytest.mark.parametrize("places", [[0, 1] * 4, [0, 1, 0, 1, 1, 0, 1, 0]], ids=["alike", "crosswise"])
def test_heads_that_have_the_same_masks_are_groups(places: list[int]) -> None:
    """The masks of the first image are compared with each other, and those of the second."""
    model = masked(lambda mask, n: mask[torch.tensor(places)])
    assert heads(model, (tokens(2), torch.rand(2, 5, 5))) == [2, 2]


def by_hand(model: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Batch and heads in one dimension; the mask is multiplied, and its complement subtracted."""
    b, t, _ = x.shape
    q, k, v = (layer(x).view(b, t, -1, 4).transpose(1, 2).reshape(-1, t, 4) for layer in (model.q, model.k, model.v))
    mask = mask[:, None, None, :].expand(b, len(q) // b, t, t).reshape(-1, t, t)
    weights = (torch.bmm(q, k.transpose(1, 2)) * mask * 0.3 - (1 - mask) * 1e4).softmax(-1)
    return model.read(torch.bmm(weights, v).view(b, -1, t, 4).transpose(1, 2).reshape(b, t, -1))


def of_a_graph(model: Any, x: Tensor, adjacency: Tensor) -> Tensor:
    """All heads of values are averaged over the same neighbours."""
    b, t, _ = x.shape
    v = model.v(x).view(b, t, -1, 4).transpose(1, 2)
    return model.read((adjacency @ v).transpose(1, 2).reshape(b, t, -1))


def test_attention_written_out_with_repeated_masks() -> None:
    layers = {name: nn.Linear(9, 16) for name in "qkv"}
    inputs = (tokens(2, 9), (torch.arange(5) < 3).float().repeat(2, 1))
    assert widths(Functional(by_hand, **layers, read=nn.Linear(16, 3)), inputs) == {"q": 2}
    graph = Functional(of_a_graph, v=nn.Linear(9, 16), read=nn.Linear(16, 3))
    assert widths(graph, (tokens(2, 9), torch.rand(5, 5))) == {"v": 2}


def test_a_matrix_for_each_head_keeps_them_apart() -> None:
    graph = Functional(of_a_graph, v=nn.Linear(9, 16), read=nn.Linear(16, 3))
    assert heads(graph, (tokens(2, 9), torch.zeros(4, 5, 5))) == []
