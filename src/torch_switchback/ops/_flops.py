"""FLOP formulas of the matmuls, for torch.utils.flop_counter."""

from typing import Any

import torch


def register_flop_formulas() -> None:
    """Have torch.utils.flop_counter's FlopCounterMode count int8 products as it counts aten.mm, from now on.

    To be called before a counter is made. It is not done unasked, for the counter's module imports Triton.
    """
    from torch.utils.flop_counter import flop_registry, mm_flop, register_flop_formula

    matmuls = [
        torch.ops.torch_switchback.int8_matmul_mixed_dequantize,
        torch.ops.torch_switchback.int8_matmul_rowwise_dequantize,
    ]
    new = [matmul for matmul in matmuls if matmul not in flop_registry]
    if new:
        register_flop_formula(new, get_raw=True)(mm_flop)  # which takes tensors by now, not shapes
        register_flop_formula(torch.ops.torch_switchback.int8_linear)(_int8_linear_flop)
        register_flop_formula(torch.ops.torch_switchback.int8_linear_grad_input)(_int8_linear_flop)


def _int8_linear_flop(rows: tuple[int, int], absmax: Any, weight: tuple[int, int], *args: Any, **kwargs: Any) -> int:
    """Count 2 per multiplication of a token's features with the weight's, whichever of its two sides they are on."""
    return 2 * rows[0] * weight[0] * weight[1]
