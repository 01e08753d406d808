"""PicoGPT, the character model of "PicoGPT-MPO" (arXiv:2603.28534) for tiny Shakespeare.

Four pre-norm layers of width 128 with 4 heads, a ReLU feed-forward of 512, sinusoidal positions, separate
query, key and value weights without biases, an untied head. With 65 characters these are 808,448 parameters,
as in the paper's public code; its text says 1,020,224.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LAYERS, _HEADS, _WIDTH, _INNER = 4, 4, 128, 512


class Attention(nn.Module):
    """Causal attention: (n, T, 128) → (n, T, 128)."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.key = nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.value = nn.Linear(_WIDTH, _WIDTH, bias=False)
        self.out = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: Tensor, past: list[Tensor] | None = None) -> Tensor:
        """softmax(q kᵀ / √32 + mask) v, in each head.

        Args:
            x: (n, T, 128).
            past: keys and values of the tokens before, to which those of the one token in ``x`` are added.
        """
        split = (*x.shape[:2], _HEADS, _WIDTH // _HEADS)
        q, k, v = (
            layer(x).view(split).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )  # (n, heads, T, 32)
        if past is not None:
            if past:
                k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
            past[:] = k, v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each added to its input: (n, T, 128) → (n, T, 128)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(_WIDTH)
        self.attention = Attention()
        self.norm2 = nn.LayerNorm(_WIDTH)
        self.up = nn.Linear(_WIDTH, _INNER)
        self.down = nn.Linear(_INNER, _WIDTH)

    def forward(self, x: Tensor, *past: list[Tensor]) -> Tensor:
        """Norms stand before the maps."""
        x = x + self.attention(self.norm1(x), *past)
        y: Tensor = x + self.down(F.relu(self.up(self.norm2(x))))
        return y


class PicoGPT(nn.Module):
    """Token ids (n, T), T up to ``context``, → logits (n, T, vocab) of each next token."""

    positions: Tensor

    def __init__(self, vocab: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, _WIDTH)
        self.register_buffer("positions", sinusoids(context), persistent=False)
        self.layers = nn.ModuleList(DecoderLayer() for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, vocab, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, input_ids: Tensor, past: list[list[Tensor]] | None = None) -> Tensor:
        """Embedding plus positions, four layers, norm, head.

        Args:
            input_ids: (n, T).
            past: a list a layer, empty before the first token, to feed one token at a time.

        Raises:
            ValueError: more tokens than the context has.
        """
        start = past[0][0].shape[2] if past and past[0] else 0
        tokens, context = start + input_ids.shape[1], len(self.positions)
        if tokens > context:
            raise ValueError(f"{tokens} tokens, but the context has {context}")
        x = self.embedding(input_ids) + self.positions[start:tokens]
        for layer, *own in zip(self.layers, *([] if past is None else [past]), strict=True):
            x = layer(x, *own)
        logits: Tensor = self.head(self.norm(x))
        return logits


def sinusoids(context: int) -> Tensor:
    """Positions (context, 128): sin in even, cos in odd columns (Vaswani et al. 2017, section 3.5)."""
    rates = 10000.0 ** (-torch.arange(0, _WIDTH, 2) / _WIDTH)
    angles = torch.arange(context)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
