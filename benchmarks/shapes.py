"""What is measured: shapes of layers that people train. CONTRIBUTING.md says what a claim about speed needs."""

from typing import NamedTuple


class Shape(NamedTuple):
    """A linear layer on its tokens: X [tokens, in] times Wᵀ [in, out]."""

    tokens: int
    in_features: int
    out_features: int

    @property
    def flop(self) -> int:
        """Floating-point (or integer) operations of one of its products."""
        return 2 * self.tokens * self.in_features * self.out_features

    def __str__(self) -> str:
        return f"{self.tokens} × {self.in_features} → {self.out_features}"


PRODUCTS = (
    Shape(65536, 1280, 5120),  # ViT-H, 256 images of 256 patches
    Shape(65536, 5120, 1280),
    Shape(16384, 4096, 4096),  # Llama-8B, 4 sequences of 4096 tokens
    Shape(16384, 4096, 14336),
    Shape(16384, 14336, 4096),
    Shape(8192, 8192, 8192),
)
# The grad_input of a layer is the product with in and out swapped, and this set is closed under that.
PRODUCT_ROLES = {
    shape: f"forward of {shape.in_features} → {shape.out_features}, "
    f"grad_input of {shape.out_features} → {shape.in_features}"
    for shape in PRODUCTS
}
SMALL = Shape(8192, 1024, 4096)  # small enough for the host to matter
ODD = (Shape(16384, 4095, 4096), Shape(8192, 1024, 50257))  # rows that 16 bytes do not divide; GPT-2's vocabulary
LAYERS = (*PRODUCTS, SMALL, *ODD)
INFERENCE = tuple(Shape(tokens, 4096, 14336) for tokens in (1, 2, 4, 8, 16, 32, 64))

MATRICES = (
    (65536, 5120),  # activations, [rows, cols]
    (65536, 1280),
    (16384, 14336),
    (16384, 4096),
    (14336, 4096),  # weights
    (5120, 1280),
)

TINY = (Shape(64, 32, 48),)
TINY_MATRICES = ((64, 48),)
