"""What torch.utils.flop_counter counts for the products."""

import torch


def register_flop_formulas() -> None:
    """Have torch.utils.flop_counter's FlopCounterMode count int8 products as it counts aten.mm, from now on.

    To be called before a counter is made. It is not done unasked, for the counter's module imports Triton.
    """
    from torch.utils.flop_counter import flop_registry, mm_flop, register_flop_formula

    products = [
        torch.ops.torch_switchback.int8_matmul_mixed_dequantize,
        torch.ops.torch_switchback.int8_matmul_rowwise_dequantize,
    ]
    new = [product for product in products if product not in flop_registry]
    if new:
        register_flop_formula(new, get_raw=True)(mm_flop)  # which takes tensors by now, not shapes
