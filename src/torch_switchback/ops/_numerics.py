"""The numbers that every operation shares: ``x ≈ x_int8 * absmax / 127``, in float32."""

import torch
from torch import Tensor

Quantized = tuple[Tensor, Tensor]
"""int8 values and their absmax."""

ONE_OVER_127 = 1.0 / 127.0


def inverse_scale(absmax: Tensor) -> Tensor:
    """Return 127 / absmax in float32 (one IEEE division), or 0 where the int8 values are 0: absmax tiny, Inf or NaN."""
    # From 2**-121 on 127 / absmax is finite: 127 / 2**-121 = 127/128 * 2**128. It is a literal, as Dynamo makes a
    # symbol of a module's float under dynamic=True, and fails on it in an autograd Function.
    usable = (absmax >= 2.0**-121) & (absmax < float("inf"))
    # Not ``127.0 / absmax``: torch computes that as absmax.reciprocal() * 127, which rounds twice.
    inverse = torch.full_like(absmax, 127.0).div_(absmax)
    return inverse.masked_fill_(~usable, 0.0)


def quantize(x: Tensor, absmax: Tensor) -> Tensor:
    """Return int8 values of x, ``rint(x * (127 / absmax))`` half to even, for absmaxes that broadcast against x.

    Where the absmax is Inf or NaN they are 0, and 0 * Inf or 0 * NaN is NaN once dequantized.
    """
    inverse = inverse_scale(absmax)
    scaled = x.float().mul(inverse).round_()
    if not bool((absmax < float("inf")).all()):  # 0 * Inf and 0 * NaN
        scaled.masked_fill_(inverse == 0, 0.0)
    return scaled.to(torch.int8)


def quantize_traceably(x: Tensor, absmax: Tensor) -> Tensor:
    """Quantize for a compiler: nothing in it depends on the data.

    A compiler may fuse it with what computes x, which is then not rounded to its dtype first and may exceed the absmax.
    """
    inverse = inverse_scale(absmax)
    scaled = x.float().mul(inverse).round().clamp(-127, 127)
    return scaled.masked_fill(inverse == 0, 0.0).to(torch.int8)  # 0 * Inf and 0 * NaN


def quantize_transposed(x: Tensor, absmax: Tensor) -> Tensor:
    """Return int8 values [cols, rows], contiguous, of x [rows, cols] for absmaxes (1,) or (cols,)."""
    rows, cols = x.shape
    qdata = x.new_empty((cols, rows), dtype=torch.int8)
    for block in row_blocks(x):
        qdata[:, block] = quantize(x[block], absmax).t()
    return qdata


def absmax_of(x: Tensor, dim: int | None = None) -> Tensor:
    """Return the largest |x| in float32, over all of x as shape (1,) or along dim; 0 over nothing; NaN stays NaN."""
    if dim is None:
        if x.numel() == 0:
            return x.new_zeros(1, dtype=torch.float32)
        low, high = torch.aminmax(x)
        return torch.maximum(low.abs(), high.abs()).float().view(1)
    if x.shape[dim] == 0:
        return x.new_zeros(x.shape[1 - dim], dtype=torch.float32)
    return x.abs().amax(dim).float()


def row_blocks(x: Tensor) -> list[slice]:
    """Return slices of the first dimension of x, each of about 2**18 elements.

    What several operations on one block leave between them stays in the cache. Mapping in one large temporary takes
    longer than the arithmetic.
    """
    rows = max(1, 2**18 * x.shape[0] // max(x.numel(), 1))
    return [slice(start, start + rows) for start in range(0, x.shape[0], rows)]
