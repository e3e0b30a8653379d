"""Transformer blocks of known models as plain PyTorch modules, every matrix in an nn.Linear."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo import RotaryEmbedding


class LlamaBlock(nn.Module):
    """A block of Llama 3 8B, [batch, tokens, width] to the same; by default in its sizes."""

    def __init__(
        self, context: int, width: int = 4096, hidden: int = 14336, heads: int = 32, kv_heads: int = 8
    ) -> None:
        super().__init__()
        self.head_width = width // heads
        self.attention_norm = nn.RMSNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.rotary = RotaryEmbedding(context, self.head_width, base=500_000.0)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        q, k, v = (p(normed).unflatten(-1, (-1, self.head_width)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.rotary(q), self.rotary(k), v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class ViTBlock(nn.Module):
    """A block of ViT-H, [batch, tokens, width] to the same; by default in its sizes."""

    def __init__(self, width: int = 1280, hidden: int = 5120, heads: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Stack(nn.Module):
    """So many blocks, one after the other."""

    def __init__(self, depth: int, new_block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(new_block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def new_on(device: torch.device, build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A module whose parameters are made on a device."""
    with device:
        return build().to(dtype)
