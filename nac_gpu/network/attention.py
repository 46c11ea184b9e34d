"""nn.MultiheadAttention after heads were merged, so that heads * width of a head is less than embed_dim."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MultiheadAttention(nn.MultiheadAttention):
    """An `nn.MultiheadAttention` with fewer heads of unchanged width. Never constructed; `shrink` changes the class.

    PyTorch's class computes the width of a head as `embed_dim // num_heads`, so it cannot have fewer heads of the same
    width. Parameters keep their names, and `forward` keeps its arguments and results.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention, as `nn.MultiheadAttention.forward`. A 3-D mask needs batch x remaining-heads planes."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._projected(query, key, value)
        batch, length = query.shape[:2]
        added = k.shape[1] - key.shape[1]  # positions of bias_k and of the zeros, which masks never hide
        heads = [x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v)]
        mask = None if attn_mask is None else _additive(attn_mask, q.dtype)
        if mask is not None and mask.dim() == 3:
            mask = mask.view(batch, self.num_heads, length, -1)
        if mask is not None:
            mask = F.pad(mask, (0, added))
        if key_padding_mask is not None:
            hidden = F.pad(_additive(key_padding_mask, q.dtype), (0, added))[:, None, None]
            mask = hidden if mask is None else mask + hidden
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = heads[0] @ heads[1].transpose(-2, -1) / heads[0].shape[-1] ** 0.5
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            weights = F.dropout(weights, dropout)
            out = weights @ heads[2]
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Projected queries, keys and values, [batch, length, heads * width of a head] each."""
        if self.in_proj_weight is not None:
            weights = list(self.in_proj_weight.chunk(3))
        else:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        biases = [None] * 3 if self.in_proj_bias is None else list(self.in_proj_bias.chunk(3))
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return [q, k, v]


def shrink(module: nn.MultiheadAttention) -> None:
    """Make a module whose projections lost heads compute with the remaining ones. The caller sets `num_heads`."""
    module.__class__ = MultiheadAttention
    module._qkv_same_embed_dim = False  # disables nn.TransformerEncoderLayer's fast path, which needs all heads


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask in the form that is added to scores: a boolean one becomes minus infinity where it is true."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
    return mask.to(dtype)
