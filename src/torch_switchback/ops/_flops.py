"""FLOP formulas of the matmuls, for torch.utils.flop_counter."""

from typing import Any

import torch


def register_flop_formulas() -> None:
    """Have torch.utils.flop_counter's FlopCounterMode count int8 matmuls as it counts aten.mm, from now on.

    To be called before a counter is made. It is not done unasked, for the counter's module imports Triton.
    """
    from torch.utils.flop_counter import flop_registry, mm_flop, register_flop_formula

    ops = torch.ops.torch_switchback
    if ops.int8_linear not in flop_registry:
        matmuls = [ops.int8_matmul_mixed_dequantize, ops.int8_matmul_rowwise_dequantize]
        register_flop_formula(matmuls, get_raw=True)(mm_flop)  # which takes tensors by now, not shapes
        register_flop_formula([ops.int8_linear, ops.int8_linear_grad_input])(_int8_linear_flop)
        register_flop_formula(ops.prepared_grad_input, get_raw=True)(mm_flop)


def _int8_linear_flop(rows: tuple[int, int], absmax: Any, weight: tuple[int, int], *args: Any, **kwargs: Any) -> int:
    """Count 2 per multiplication of a token's features with the weight's, whichever of its two sides they are on."""
    return 2 * rows[0] * weight[0] * weight[1]
