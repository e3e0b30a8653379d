"""A diffusion transformer with adaptive norms (arXiv 2212.09748) over image and text tokens, trained by flow matching.

As in FLUX, image and text tokens share every attention. In the first blocks each of the two has weights of its own, in
the others they share them. Every weight matrix sits in a plain `nn.Linear`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt import RotaryEmbedding


@dataclass(frozen=True)
class DiTConfig:
    image_size: int  # of the images, or of their latents
    channels: int
    patch_size: int
    text_tokens: int
    text_width: int
    width: int
    hidden: int  # width of the MLPs
    heads: int
    double_blocks: int  # blocks in which image and text have weights of their own
    single_blocks: int  # blocks in which they share them

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


# Half of the blocks double, half single; in FLUX.1 it is 19 and 38.
FLUX = DiTConfig(128, 16, 2, 512, 4096, width=3072, hidden=12288, heads=24, double_blocks=2, single_blocks=2)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Stream(nn.Module):
    """All that a block does to some tokens [batch, tokens, width] but the attention."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, head_width = config.heads, config.width // config.heads
        self.modulation = nn.Linear(config.width, 6 * config.width)
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.norm_q, self.norm_k = nn.RMSNorm(head_width), nn.RMSNorm(head_width)
        self.out = nn.Linear(config.width, config.width)
        self.up = nn.Linear(config.width, config.hidden)
        self.down = nn.Linear(config.hidden, config.width)

    def modulations(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the attention, then of the MLP, each [batch, 1, width]."""
        return self.modulation(F.silu(condition))[:, None].chunk(6, dim=-1)

    def project(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [batch, heads, tokens, head_width]."""
        qkv = self.qkv(modulate(self.norm(x), shift, scale))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.norm_q(q), self.norm_k(k), v

    def update(
        self, x: Tensor, attended: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, mlp_gate: Tensor
    ) -> Tensor:
        x = x + gate * self.out(attended)
        hidden = F.gelu(self.up(modulate(self.norm(x), shift, scale)), approximate="tanh")
        return x + mlp_gate * self.down(hidden)


class Block(nn.Module):
    """Attention over the tokens of one or two streams, and an MLP for each."""

    def __init__(self, config: DiTConfig, streams: int) -> None:
        super().__init__()
        self.streams = nn.ModuleList(Stream(config) for _ in range(streams))
        self.rotary = RotaryEmbedding(config.text_tokens + config.patches, config.width // config.heads)

    def forward(self, parts: list[Tensor], condition: Tensor) -> list[Tensor]:
        modulations = [stream.modulations(condition) for stream in self.streams]
        projected = [s.project(x, *m[:2]) for s, x, m in zip(self.streams, parts, modulations, strict=True)]
        q, k, v = (torch.cat(each, dim=2) for each in zip(*projected, strict=True))
        y = F.scaled_dot_product_attention(self.rotary(q), self.rotary(k), v).transpose(1, 2).flatten(-2)
        attended = y.split([x.shape[1] for x in parts], dim=1)
        each_stream = zip(self.streams, parts, attended, modulations, strict=True)
        return [stream.update(x, part, *m[2:]) for stream, x, part, m in each_stream]


class DiT(nn.Module):
    """Noisy images [batch, channels, size, size], text [batch, tokens, text_width] and times [batch] to velocities."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        features, width = config.channels * config.patch_size**2, config.width
        self.embed_image = nn.Linear(features, width)
        self.embed_text = nn.Linear(config.text_width, width)
        self.embed_time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(config, streams=2) for _ in range(config.double_blocks))
        self.blocks.extend(Block(config, streams=1) for _ in range(config.single_blocks))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, features)

    def forward(self, images: Tensor, text: Tensor, times: Tensor) -> Tensor:
        patch_size, double_blocks = self.config.patch_size, self.config.double_blocks
        image = self.embed_image(F.unfold(images, patch_size, stride=patch_size).transpose(1, 2))
        parts = [self.embed_text(text), image]
        condition = self.embed_time(waves(times).type_as(images)) + parts[0].mean(1)
        for block in self.blocks[:double_blocks]:
            parts = block(parts, condition)
        parts = [torch.cat(parts, dim=1)]
        for block in self.blocks[double_blocks:]:
            parts = block(parts, condition)
        image = parts[0][:, text.shape[1] :]
        shift, scale = self.modulation(F.silu(condition))[:, None].chunk(2, dim=-1)
        patches = self.head(modulate(self.norm(image), shift, scale))
        return F.fold(patches.transpose(1, 2), images.shape[-2:], patch_size, stride=patch_size)


def waves(times: Tensor, features: int = 256) -> Tensor:
    """Return times [batch] between 0 and 1 as sines and cosines [batch, features]."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(features // 2, device=times.device) / (features // 2))
    angles = 1000 * times.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def flow(images: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Return the noisy images at some times, and the velocities that a model is to predict (arXiv 2210.02747)."""
    t = times[:, None, None, None]
    return (1 - t) * images + t * noise, noise - images
