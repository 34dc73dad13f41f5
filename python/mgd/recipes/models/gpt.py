"""A small GPT (Radford et al. 2019) for bytes or words."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mgd.recipes.models.residual import Residual, dropouts


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (p.view(b, t, self.heads, c // self.heads).transpose(1, 2) for p in self.qkv(x).split(c, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, c))


class GPT(nn.Module):
    """A pre-norm decoder with learned positions and tied embeddings (`[B, T]` tokens to `[B, T, V]` logits). dropout:
    its rate, at the end of every residual branch (Vaswani et al. 2017, arXiv 1706.03762)."""

    def __init__(
        self,
        vocabulary: int = 256,
        context: int = 64,
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                Residual(nn.Sequential(nn.LayerNorm(width), _Attention(width, heads), *dropouts(dropout))),
                Residual(
                    nn.Sequential(
                        nn.LayerNorm(width),
                        nn.Linear(width, 4 * width),
                        nn.GELU(),
                        nn.Linear(4 * width, width),
                        *dropouts(dropout),
                    )
                ),
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
