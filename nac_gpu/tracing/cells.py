"""Decompositions of the recurrent cells that CUDA runs as one fused operation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _lstm_cell(
    inputs: Tensor, hidden: Tensor, state: Tensor, input_bias: Tensor | None = None, hidden_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The new hidden and cell state of an LSTM cell, [batch, n] each, and its gates before activation, [batch, 4 n].

    Args:
        inputs: contribution of the input to the gates, [batch, 4 n].
        hidden: contribution of the hidden state to the gates, [batch, 4 n].
        state: the cell state, [batch, n].
        input_bias: [4 n].
        hidden_bias: [4 n].
    """
    gates = _biased(inputs, input_bias) + _biased(hidden, hidden_bias)
    opening, forgetting, new, showing = gates.chunk(4, 1)
    state = forgetting.sigmoid() * state + opening.sigmoid() * new.tanh()
    return showing.sigmoid() * state.tanh(), state, gates


def _gru_cell(
    inputs: Tensor, hidden: Tensor, state: Tensor, input_bias: Tensor | None = None, hidden_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The new state of a GRU cell, [batch, n], and its gates, [batch, 3 n]; arguments as for `_lstm_cell`, with 3 n."""
    inputs, hidden = _biased(inputs, input_bias), _biased(hidden, hidden_bias)
    (reset, update, new), (own_reset, own_update, own) = inputs.chunk(3, 1), hidden.chunk(3, 1)
    new = (new + (reset + own_reset).sigmoid() * own).tanh()
    return (state - new) * (update + own_update).sigmoid() + new, inputs


def _biased(gates: Tensor, bias: Tensor | None) -> Tensor:
    return gates if bias is None else gates + bias


#: Decompositions by CUDA's fused operation. Results other than the states only serve the backward pass; a recorded pass
#: never reads them.
CELLS: dict[Any, Callable[..., tuple[Tensor, ...]]] = {
    torch.ops.aten._thnn_fused_lstm_cell.default: _lstm_cell,
    torch.ops.aten._thnn_fused_gru_cell.default: _gru_cell,
}
