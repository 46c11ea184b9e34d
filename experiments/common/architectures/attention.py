"""Networks with attention, and language models."""
# ruff: noqa: D102 -- every method without a docstring is a forward pass

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.architectures.registry import architecture, floats, several, tokens


class Encoder(nn.Module):
    """PyTorch's own encoder layers."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.1, batch_first=True, norm_first=norm_first)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x)).mean(1))


architecture("transformer_encoder", tokens(2, 6))(lambda: Encoder(False))
architecture("transformer_encoder_norm_first", tokens(2, 6))(lambda: Encoder(True))


@architecture("transformer_decoder", several(tokens(2, 5), floats(2, 7, 16)))
class Decoder(nn.Module):
    """PyTorch's own decoder layer with a causal mask, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 16)
        self.layers = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(16, 2, 20, activation="gelu"), 1, nn.LayerNorm(16)
        )
        self.head = nn.Linear(16, 31)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=memory.dtype)
        x = self.layers(self.embed(x).transpose(0, 1), memory.transpose(0, 1), tgt_mask=mask)
        return self.head(x.transpose(0, 1))


@architecture("multihead_attention", floats(2, 6, 9))
class MultiheadAttention(nn.Module):
    """PyTorch's own attention between layers that do not fix its width, its weights read too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(9, 12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.up, self.head = nn.Linear(12, 20), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(x)
        x, weights = self.attention(x, x, x)
        return self.head(self.up(x).relu()), weights


class RMSNorm(nn.Module):
    """Division by the root of the mean square, and scales."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotated(x: Tensor) -> Tensor:
    """Rotary positions on [batch, heads, time, head size]."""
    half = x.shape[-1] // 2
    rates = 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * rates
    angles = torch.cat([angles, angles], -1)
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * angles.cos() + turned * angles.sin()


class LlamaBlock(nn.Module):
    """RMSNorm, rotary grouped-query attention, SwiGLU."""

    def __init__(self, width: int = 16, heads: int = 4, shared: int = 2, hidden: int = 20) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.attention_norm, self.mlp_norm = RMSNorm(width), RMSNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, shared * self.head_dim, bias=False) for _ in range(2))
        self.o = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        y = self.attention_norm(x)
        q, k, v = (layer(y).view(b, t, -1, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = rotated(q), rotated(k)
        copies = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(copies, 1), v.repeat_interleave(copies, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, -1))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


@architecture("llama", tokens(2, 6))
class Llama(nn.Module):
    """Two such blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 16)
        self.blocks = nn.ModuleList(LlamaBlock() for _ in range(2))
        self.norm, self.head = RMSNorm(16), nn.Linear(16, 31, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@architecture("attention_separate", floats(2, 6, 9))
class SeparateAttention(nn.Module):
    """Separate q, k, v of a fixed head size; no residual stream, so values and queries have widths of their own."""

    head_dim = 4

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(9, 12), nn.Linear(9, 12), nn.Linear(9, 12)
        self.o, self.head = nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, -1, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)
        return self.head(self.o(x).relu())


@architecture("attention_inner", floats(2, 6, 9))
class InnerAttention(nn.Module):
    """The number of heads is fixed, their size follows from the tensors; softmax written out."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.q, self.k, self.v = nn.Linear(9, 12), nn.Linear(9, 12), nn.Linear(9, 15)
        self.o = nn.Linear(15, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-2, -1) / 2.0).softmax(-1)
        return self.o((scores @ v).transpose(1, 2).reshape(b, t, -1))


@architecture("attention_width_kept", floats(2, 6, 9))
class WidthKeptAttention(nn.Module):
    """The code keeps the number of heads and the width of all together, as timm's; a hidden layer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 3
        self.attn_dim = self.num_heads * self.head_dim
        self.qkv, self.proj = nn.Linear(9, 3 * self.attn_dim), nn.Linear(self.attn_dim, 9)
        self.up, self.head = nn.Linear(9, 40), nn.Linear(40, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, self.attn_dim)
        return self.head(F.gelu(self.up(x + self.proj(y))))


@architecture("attention_single", floats(2, 6, 9))
class SingleHead(nn.Module):
    """One head, scaled by a constant, batched matrix products; its inputs come from a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(9, 11)
        self.q, self.k, self.v = nn.Linear(11, 8), nn.Linear(11, 8), nn.Linear(11, 10)
        self.o = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).relu()
        weights = torch.softmax(torch.bmm(self.q(x), self.k(x).transpose(1, 2)) * 0.3, dim=-1)
        return self.o(torch.bmm(weights, self.v(x)))


@architecture("attention_scaled_by_size", floats(2, 6, 9))
class ScaledBySize(nn.Module):
    """Scores over the root of the head size: a size that changes when queries and keys merge."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(9, 8), nn.Linear(9, 8), nn.Linear(9, 10)
        self.o = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.q(x), self.k(x)
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1)
        return self.o(weights @ self.v(x))


@architecture("attention_fused", floats(2, 6, 12))
class FusedAttention(nn.Module):
    """A vision transformer's attention: one Linear for q, k, v, reshaped with sizes of the module."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.embed, self.qkv, self.proj = nn.Linear(12, 12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c)
        return self.head(x + self.proj(y))


@architecture("attention_einsum", floats(2, 6, 9))
class EinsumAttention(nn.Module):
    """Weights with a dimension of heads, contracted by einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(9, 3, 4) / 3) for _ in range(3))
        self.o = nn.Parameter(torch.randn(3, 4, 8) / 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btc,chd->bhtd", x, weight) for weight in (self.q, self.k, self.v))
        weights = torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1)
        return self.head(torch.einsum("bhts,bhsd,hdc->btc", weights, v, self.o).relu())


@architecture("linear_attention", floats(2, 6, 9))
class LinearAttention(nn.Module):
    """Keys and values are contracted first: softmax over the features of the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(9, 8), nn.Linear(9, 8), nn.Linear(9, 10)
        self.o = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1, self.v(x)
        total = (q * k.sum(1, keepdim=True)).sum(-1, keepdim=True)
        return self.o(q @ (k.transpose(1, 2) @ v) / total)


@architecture("vision_transformer", floats(2, 3, 8, 8))
class VisionTransformer(nn.Module):
    """Patches, CLS token, learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.cls = nn.Parameter(torch.zeros(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 5, 16) / 50)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(x))[:, 0])


@architecture("tokens_without_norm", floats(2, 3, 8, 8))
class TokensWithoutNorm(nn.Module):
    """CLS token and positions on a stream that no normalisation fixes; mixing over tokens, then over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 14, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, 14))
        self.positions = nn.Parameter(torch.randn(5, 14))
        self.over_tokens = nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 5))
        self.over_channels = nn.Sequential(nn.Linear(14, 20), nn.GELU(), nn.Linear(20, 14))
        self.head = nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = x + self.over_tokens(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.over_channels(x)
        return self.head(x[:, 0])


class MixtureOfExperts(nn.Module):
    """Top-1 routing: each expert sees its tokens only."""

    def __init__(self, scatter: bool) -> None:
        super().__init__()
        self.scatter = scatter
        self.embed, self.router = nn.Linear(6, 10), nn.Linear(10, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(10, 14), nn.ReLU(), nn.Linear(14, 8)) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).relu().flatten(0, 1)
        weights, chosen = self.router(x).softmax(-1).max(-1)
        if self.scatter:
            y = x.new_zeros(len(x), self.head.in_features)
            for number, expert in enumerate(self.experts):
                where = (chosen == number).nonzero().flatten()
                y = y.index_add(0, where, expert(x[where]) * weights[where, None])
        else:
            y = sum(expert(x) * (weights * (chosen == number))[:, None] for number, expert in enumerate(self.experts))
        assert isinstance(y, Tensor)
        return self.head(y)


architecture("mixture_of_experts_dense", floats(2, 8, 6))(lambda: MixtureOfExperts(False))
architecture("mixture_of_experts_scatter", floats(2, 8, 6))(lambda: MixtureOfExperts(True))


@architecture("tied_language_model", tokens(2, 6))
class TiedLanguageModel(nn.Module):
    """The head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(31, 12), nn.Linear(12, 18), nn.Linear(18, 12)
        self.head = nn.Linear(12, 31, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.out(F.gelu(self.hidden(x))))


@architecture("tied_functional_language_model", tokens(2, 6))
class TiedFunctional(nn.Module):
    """The embedding's table is used again by `F.linear`, scaled at the input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(31, 12, padding_idx=0), nn.Embedding(8, 12)
        self.hidden, self.out = nn.Linear(12, 18), nn.Linear(18, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) * 3.5 + self.position(torch.arange(x.shape[1]))
        return F.linear(x + self.out(self.hidden(x).relu()), self.embed.weight)


@architecture("perceiver", floats(2, 7, 9))
class Perceiver(nn.Module):
    """Learned queries read the input; the latents are the sequence that goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(4, 10))
        self.k, self.v = nn.Linear(9, 10), nn.Linear(9, 10)
        self.mlp, self.head = nn.Sequential(nn.Linear(10, 16), nn.GELU(), nn.Linear(16, 10)), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.latents @ self.k(x).transpose(1, 2)).softmax(-1)
        latents = self.latents + weights @ self.v(x)
        return self.head(latents + self.mlp(latents))
