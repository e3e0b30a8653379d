"""Sums of columns: of a gradient over its tokens, which is the bias's. An operation for the layer, not for users."""

import torch

from ._library import define


def sum_columns(x: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """The sums [cols] of the columns of x [rows, cols], added up in float32 and rounded once to out_dtype."""
    # PyTorch adds up a 16-bit sum in float32 and rounds once: no need to cast if the dtype stays.
    return x.sum(0, dtype=x.dtype if x.dtype == out_dtype else torch.float32).to(out_dtype)


# The kernel's sums are not these bit for bit: they depend on the order in which float32 is added up, which is its own.
column_sums_op = define(
    "column_sums(Tensor x, ScalarType out_dtype) -> Tensor",
    allocate=lambda x, out_dtype: x.new_empty((x.shape[1],), dtype=out_dtype),
    meaning=sum_columns,
    kernels="column_sums",
)
