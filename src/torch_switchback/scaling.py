"""Schemes: how the operands of a layer's matmuls are quantized (arXiv 2304.13013, section 2.2).

With X [tokens, in], W [out, in] and G = dL/dY [tokens, out], a scheme says how the rows of X and G, and W and Wᵀ, are
quantized, and which matmul undoes it. Every method returns int8 values, and their absmax in float32.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from . import ops as _ops  # noqa: F401  (defines the operations)
from .config import ROTATIONS, SwitchBackConfig
from .ops._library import can_skip_dispatcher, direct, dispatched
from .ops._numerics import Quantized


class Scaling:
    """Base of all schemes: one absmax per row of X, of G and of W.

    A subclass sets in ``__init__`` what differs, and overrides the methods that raise
    NotImplementedError. It calls operations as ``self.ops.name`` (docs/architecture.md, "Add a
    weight scaling").

    Args:
        ops: the operations to call, :data:`.ops._library.direct` or :data:`.ops._library.dispatched`.
    """

    # Attributes, not methods, so that they can be operations: every Python function in between costs CPU time.
    quantize_input: Callable[[Tensor], Quantized]  # X [tokens, in] -> int8 [tokens, in]
    quantize_grad: Callable[[Tensor], Quantized]  # G [tokens, out] -> int8 [tokens, out]
    quantize_weight: Callable[[Tensor], Quantized]  # W [out, in] -> int8 [out, in], for the output
    matmul: Callable[..., Tensor]  # multiplies the rows of X or G with W or Wᵀ, and dequantizes
    rowwise: bool = True
    """True if W has one absmax per row, False if it has one in all. Operations that quantize or fold W take it."""
    is_fused: bool = False
    """True if the layer calls ``int8_linear`` and ``int8_linear_grad_input`` for a plain weight that is not cached.

    It then calls neither quantize_weight and quantize_weight_transpose nor matmul. Only :func:`_schemes` sets it, so
    that no subclass inherits it.
    """

    def __init__(self, ops: SimpleNamespace) -> None:
        self.ops = ops
        self.quantize_input = self.quantize_grad = self.quantize_weight = ops.quantize_rowwise
        self.matmul = ops.int8_matmul_rowwise_dequantize

    def quantize_weight_transpose(self, weight: Tensor, absmax: Tensor) -> Quantized:
        """Quantize Wᵀ for grad_input, given W and the absmax that the forward found: int8 [in, out]."""
        raise NotImplementedError

    def quantize_weight_with_transpose(self, weight: Tensor) -> tuple[Quantized, Quantized]:
        """Quantize W and Wᵀ together."""
        quantized = self.quantize_weight(weight)
        return quantized, self.quantize_weight_transpose(weight, quantized[1])

    def transpose_prepared(self, weight_int8: Tensor, absmax: Tensor) -> Quantized:
        """Return what a prepared layer keeps of Wᵀ, given W quantized: int8 [in, out] and its absmax."""
        return self.ops.transpose_int8(weight_int8), absmax

    def prepared_grad_input(
        self,
        grad: Tensor,
        weight_int8: Tensor,
        absmax: Tensor,
        transposed: Tensor | None,
        in_features: int,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """Compute grad_input [tokens, in_features] of a prepared layer from G [tokens, out].

        Args:
            absmax: of what transpose_prepared returned if transposed is given, else of weight_int8.
            transposed: the int8 values that transpose_prepared returned, if they were kept.
        """
        if transposed is None:
            transposed, absmax = self.transpose_prepared(weight_int8, absmax)
        if transposed.shape[0] != in_features:  # of whole rotated blocks
            transposed, absmax = transposed[:in_features], absmax[:in_features]
        grad_int8, row_absmax = self.quantize_grad(grad)
        return self.matmul(grad_int8, transposed.t(), row_absmax, absmax, None, out_dtype)

    def quantize_columns(self, x: Tensor, rotate_tokens: int | None) -> Quantized:
        """Quantize the columns of X or G for an int8 grad_weight, rotated along the tokens: int8 [features, tokens]."""
        if rotate_tokens is None:
            return self.ops.quantize_columnwise_and_transpose(x)
        return self.ops.quantize_rotated_columnwise_and_transpose(x, rotate_tokens)

    def quantize_rows_and_columns(self, x: Tensor, rotate_tokens: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Quantize the rows of X or G, and its columns as :meth:`quantize_columns` does."""
        if rotate_tokens is None:
            return *self.quantize_input(x), *self.quantize_columns(x, None)
        return self.ops.quantize_rowwise_and_rotated_columnwise(x, rotate_tokens)


class PaperScaling(Scaling):
    """A scheme of the paper, whose prepared layers compute grad_input in one operation."""

    def prepared_grad_input(
        self,
        grad: Tensor,
        weight_int8: Tensor,
        absmax: Tensor,
        transposed: Tensor | None,
        in_features: int,
        out_dtype: torch.dtype,
    ) -> Tensor:
        return self.ops.prepared_grad_input(grad, weight_int8, absmax, transposed, self.rowwise, out_dtype)


class GlobalScaling(PaperScaling):
    """One absmax for all of W (algorithm 1)."""

    rowwise = False

    def __init__(self, ops: SimpleNamespace) -> None:
        super().__init__(ops)
        self.quantize_weight = ops.quantize_global
        self.matmul = ops.int8_matmul_mixed_dequantize

    def quantize_weight_transpose(self, weight: Tensor, absmax: Tensor) -> Quantized:
        return self.ops.quantize_transpose_by_absmax(weight, absmax), absmax

    def quantize_weight_with_transpose(self, weight: Tensor) -> tuple[Quantized, Quantized]:
        weight_int8, transposed_int8, absmax = self.ops.quantize_global_with_transpose(weight)
        return (weight_int8, absmax), (transposed_int8, absmax)


class RowwiseScaling(PaperScaling):
    """One absmax per row of W (out feature), and one per column (in feature) for grad_input (algorithm 3).

    A prepared layer has the first alone, and quantizes G times it (:mod:`.ops.prepared_weight`).
    """

    def quantize_weight_transpose(self, weight: Tensor, absmax: Tensor) -> Quantized:
        return self.ops.quantize_columnwise_and_transpose(weight)


class RotatedScaling(Scaling):
    """Row-wise scaling of operands rotated along each matmul's inner dimension, which leaves the product as it is.

    Args:
        block: how many features a Hadamard matrix mixes.
    """

    def __init__(self, ops: SimpleNamespace, block: int) -> None:
        super().__init__(ops)
        self.block = block
        self.quantize_input = self.quantize_grad = self.quantize_weight = self.quantize_rows

    def quantize_rows(self, x: Tensor) -> Quantized:
        """Quantize the rows of x, rotated along the features."""
        return self.ops.quantize_rotated_rowwise(x, self.block)

    def quantize_weight_transpose(self, weight: Tensor, absmax: Tensor) -> Quantized:
        return self.ops.quantize_rotated_columnwise_and_transpose(weight, self.block)

    def transpose_prepared(self, weight_int8: Tensor, absmax: Tensor) -> Quantized:
        """Quantize Wᵀ rotated along the out features: W's own int8 values are rotated along the in features."""
        return self.ops.requantize_rotated(weight_int8, absmax, self.block)

    def quantize_rows_and_columns(self, x: Tensor, rotate_tokens: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *self.quantize_rows(x), *self.quantize_columns(x, rotate_tokens)


def _schemes(ops: SimpleNamespace) -> dict[tuple[str, int | None], Scaling]:
    by_layer, by_row = GlobalScaling(ops), RowwiseScaling(ops)
    by_layer.is_fused = by_row.is_fused = True
    schemes: dict[tuple[str, int | None], Scaling] = {("global", None): by_layer, ("rowwise", None): by_row}
    return schemes | {("rowwise", block): RotatedScaling(ops, block) for block in ROTATIONS}


_DIRECT, _DISPATCHED = _schemes(direct), _schemes(dispatched)


def scaling_for(config: SwitchBackConfig, first: Tensor, *others: Tensor | None) -> Scaling:
    """Return the scheme of a config, for a pass on these tensors: past the dispatcher if nothing can tell."""
    schemes = _DIRECT if can_skip_dispatcher(first, *others) else _DISPATCHED
    return schemes[config.weight_scaling, config.rotate_features]
