"""Recurrent cells that CUDA runs as one operation, as the operations that they are made of."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _lstm_cell(
    inputs: Tensor, hidden: Tensor, state: Tensor, input_bias: Tensor | None = None, hidden_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The new hidden state and state of an LSTM cell, [batch, n] each, and its gates [batch, 4 n], before activation.

    Args:
        inputs: what the input makes of the gates, [batch, 4 n].
        hidden: what the hidden state makes of them, [batch, 4 n].
        state: [batch, n].
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


#: By the operation of CUDA. What they give besides the states is for a backward pass only, and nobody reads it here.
CELLS: dict[Any, Callable[..., tuple[Tensor, ...]]] = {
    torch.ops.aten._thnn_fused_lstm_cell.default: _lstm_cell,
    torch.ops.aten._thnn_fused_gru_cell.default: _gru_cell,
}
