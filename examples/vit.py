"""A vision transformer (arXiv 2010.11929) whose every weight matrix sits in a plain `nn.Linear`, and images for it."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ViTConfig:
    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    classes: int = 16


class Block(nn.Module):
    """Attention and a feed-forward network, each after a LayerNorm and added, [batch, patches, width] to the same."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm_attention = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm_mlp = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class ViT(nn.Module):
    """Images [batch, 3, size, size] to logits [batch, classes]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        patches = (config.image_size // config.patch_size) ** 2
        self.embedding = nn.Linear(3 * config.patch_size**2, config.width)
        self.position = nn.Parameter(0.02 * torch.randn(patches, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, self.patch_size, stride=self.patch_size).transpose(1, 2)
        x = self.embedding(patches) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def gratings(config: ViTConfig, batch_size: int, *, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Noisy striped images [batch, 3, size, size] and, [batch], which of the directions their stripes have."""
    generator = torch.Generator(device).manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    labels = torch.randint(config.classes, (batch_size,), generator=generator, device=device)
    angle = (math.pi * labels / config.classes)[:, None, None]
    line = torch.linspace(-1, 1, config.image_size, device=device)
    along = line[None, :, None] * angle.cos() + line[None, None, :] * angle.sin()
    frequency, phase = 8 + 8 * uniform(batch_size, 1, 1), 2 * math.pi * uniform(batch_size, 1, 1)
    color = uniform(batch_size, 3, 1, 1)
    noise = torch.randn(batch_size, 3, *2 * (config.image_size,), generator=generator, device=device)
    return color * (frequency * along + phase).sin()[:, None] + 0.5 * noise, labels
