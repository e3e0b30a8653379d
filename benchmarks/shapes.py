"""The shapes that are measured: layers that people train."""

from typing import NamedTuple


class Shape(NamedTuple):
    """A linear layer on its tokens: X [tokens, in] times Wᵀ [in, out]."""

    tokens: int
    in_features: int
    out_features: int

    @property
    def flop(self) -> int:
        """Operations of one of its matmuls."""
        return 2 * self.tokens * self.in_features * self.out_features

    def __str__(self) -> str:
        return f"{self.tokens} × {self.in_features} → {self.out_features}"


class Matrix(NamedTuple):
    rows: int
    cols: int

    def __str__(self) -> str:
        return f"{self.rows} × {self.cols}"


# The grad_input of a layer is the matmul with in and out swapped, and this set is closed under that.
MATMULS = (
    Shape(65536, 1280, 5120),  # ViT-H, 256 images of 256 patches
    Shape(65536, 5120, 1280),
    Shape(16384, 4096, 4096),  # Llama-8B, 4 sequences of 4096 tokens
    Shape(16384, 4096, 14336),
    Shape(16384, 14336, 4096),
    Shape(8192, 8192, 8192),
)
SMALL = Shape(8192, 1024, 4096)  # small enough for CPU overhead to matter
ODD = (Shape(16384, 4095, 4096), Shape(8192, 1024, 50257))  # rows that 16 bytes do not divide; GPT-2's vocabulary
LAYERS = (*MATMULS, *ODD, SMALL)
INFERENCE = tuple(Shape(tokens, 4096, 14336) for tokens in (1, 2, 4, 8, 16, 32, 64))
MATRICES = (
    Matrix(65536, 5120),  # activations
    Matrix(65536, 1280),
    Matrix(16384, 14336),
    Matrix(16384, 4096),
    Matrix(14336, 4096),  # weights
    Matrix(5120, 1280),
)
TINY = (Shape(64, 32, 48),)
TINY_MATRICES = (Matrix(64, 48),)
