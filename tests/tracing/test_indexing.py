"""Rows that are read, written, counted or sorted by data."""

from collections.abc import Callable

import pytest
import torch
from functional import around, left_alone, widths
from torch import Tensor

Between = Callable[..., Tensor]
ROWS = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
PLACES = torch.tensor([0, 0, 1, 2, 2, 3])


def over(x: Tensor, places: Tensor) -> Tensor:
    """The place of each row, for all of its channels."""
    return places[:, None].expand(-1, x.shape[1])


def new(x: Tensor, rows: int = 4) -> Tensor:
    return x.new_zeros(rows, x.shape[1])


#: Of rows [6, channels] and their places, in some of four other rows.
GRAPHS: dict[str, Between] = {
    "scatter": lambda x, i: new(x).scatter(0, over(x, i), x),
    "scatter_in_place": lambda x, i: new(x).scatter_(0, over(x, i), x),
    "scatter_add": lambda x, i: new(x).scatter_add(0, over(x, i), x),
    "scatter_add_repeated": lambda x, i: new(x).scatter_add(0, i[:, None].repeat(1, x.shape[1]), x),
    "scatter_maximum": lambda x, i: new(x).scatter_reduce(0, over(x, i), x, "amax", include_self=False),
    "scatter_mean": lambda x, i: new(x).scatter_reduce(0, over(x, i), x, "mean"),
    "transposed": lambda x, i: new(x).mT.scatter_reduce(1, i.expand(x.shape[1], -1), x.mT, "sum").mT,
    "index_add": lambda x, i: new(x).index_add(0, i, x),
    "index_copy": lambda x, i: new(x).index_copy(0, i, x),
    "index_maximum": lambda x, i: new(x).index_reduce(0, i, x, "amax"),
    "index_mean": lambda x, i: new(x).index_reduce_(0, i, x, "mean"),
    "index_fill": lambda x, i: x.index_fill(0, i, 2.0),
    "put": lambda x, i: new(x).index_put((i,), x),
    "put_added": lambda x, i: new(x).index_put((i,), x, accumulate=True),
    "gather": lambda x, i: x.gather(0, over(x, i)),
    "segments": lambda x, i: torch.segment_reduce(x, "mean", lengths=i.bincount()),
    "neighbours": lambda x, i: (x[i] - x).view(3, 2, -1).amax(1),
}


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("how", GRAPHS)
def test_rows_that_are_put_where_others_are(how: str) -> None:
    assert widths(around(GRAPHS[how]), (ROWS, PLACES)) == {"make": 4}


#: Of tokens [batch, 5, channels], along the tokens.
ORDER: dict[str, Between] = {
    "largest": lambda x: x.topk(2, 1).values,
    "kth": lambda x: x.kthvalue(2, 1).values,
    "median": lambda x: x.median(1).values,
    "median_known": lambda x: x - x.nanmedian(1, keepdim=True).values,
    "mode": lambda x: x.mode(1).values,
    "sorted": lambda x: x.sort(1, descending=True).values,
    "quantiles": lambda x: torch.quantile(x, torch.tensor([0.3, 0.6], dtype=x.dtype), dim=1).mean(0),
    "quantile_known": lambda x: torch.nanquantile(x, 0.3, dim=1),
    "maxima_so_far": lambda x: x.cummax(1).values,
    "log_sums": lambda x: x.logcumsumexp(1),
    "extremes": lambda x: torch.sub(*x.aminmax(dim=1)),
    "positive": lambda x: x * (x > 0).any(1, keepdim=True) + (x > -1).all(1, keepdim=True),
    "place": lambda x: x + x.argmax(1, keepdim=True),
    "gathered_sorted": lambda x: x.gather(1, x.abs().argsort(1)),
    "gathered_largest": lambda x: x.gather(1, x.abs().topk(2, 1).indices),
    "gathered_maximum": lambda x: x.gather(1, x.max(1, keepdim=True).indices)[:, 0],
    "taken_along": lambda x: torch.take_along_dim(x, x.argsort(1), 1),
    "put_back": lambda x: torch.zeros_like(x).scatter(1, x.abs().topk(2, 1).indices, 1.0) * x,
}


@pytest.mark.parametrize("how", ORDER)
def test_order_of_tokens(how: str) -> None:
    assert widths(around(ORDER[how]), TOKENS) == {"make": 4}


#: The same along the channels.
OF_CHANNELS: dict[str, Between] = {
    "largest": lambda x: x.topk(8, -1).values,
    "largest_by_default": lambda x: x.topk(2).values.repeat(1, 1, 4),
    "kth": lambda x: x * x.kthvalue(2, keepdim=True).values,
    "median": lambda x: x - x.median(-1, keepdim=True).values,
    "median_of_all": lambda x: x - x.median(),
    "mode": lambda x: x - x.mode(keepdim=True).values,
    "quantile": lambda x: x - torch.quantile(x, 0.3, -1, keepdim=True),
    "place": lambda x: x * x.argmax(-1, keepdim=True),
    "gathered_sorted": lambda x: x.gather(-1, x.argsort(-1)),
    "put_back": lambda x: torch.zeros_like(x).scatter(-1, x.topk(2, -1).indices, 1.0) * x,
}


@pytest.mark.parametrize("how", OF_CHANNELS)
def test_order_of_channels_keeps_them_apart(how: str) -> None:
    assert " is taken over channels in " in left_alone(around(OF_CHANNELS[how]), TOKENS)


def test_the_largest_of_each_pair_of_channels() -> None:
    def largest(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 2)).topk(1).values.flatten(-2)

    assert widths(around(largest, read=4), TOKENS) == {"make": 2}


def test_indices_that_differ_between_channels_keep_them_apart() -> None:
    places = torch.randint(4, (6, 8), generator=torch.Generator().manual_seed(1))
    for between in (
        lambda x, i: new(x).scatter_add(0, i, x),
        lambda x, i: new(x).scatter_reduce(0, i, x, "amax"),
        lambda x, i: x.gather(0, i),
    ):
        assert "values that differ between them" in left_alone(around(between), (ROWS, places))


def test_some_of_the_channels_are_not_all_of_them() -> None:
    for between in (
        lambda x, i: x.gather(0, over(x, i)[:, :4]),
        lambda x, i: new(x).scatter_add(0, over(x, i)[:, :4], x)[:, :4],
    ):
        why = left_alone(around(between, read=4), (ROWS, PLACES))
        assert "picked by index" in why or "writes along channels" in why
