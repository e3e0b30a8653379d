"""INT8 training for PyTorch: SwitchBackLinear (arXiv 2304.13013) and the operations it is made of."""

from .advice.explanation import Explanation, FallbackError, explain
from .advice.recommendation import Recommendation, recommend
from .config import SwitchBackConfig
from .convert import ConversionReport, conversion_report, convert_to_switchback, revert_switchback
from .distributed import precompute_absmax_for_fsdp
from .functional import switchback_linear
from .integrations.bitsandbytes import install_as_bitsandbytes
from .nn import (
    SwitchBackLinear,
    SwitchBackLinearGlobal,
    SwitchBackLinearGlobalMemEfficient,
    SwitchBackLinearVectorwise,
)
from .ops import (
    dequantize_rowwise,
    int8_matmul_mixed_dequantize,
    int8_matmul_rowwise_dequantize,
    quantize_columnwise_and_transpose,
    quantize_global,
    quantize_global_transpose,
    quantize_global_with_transpose,
    quantize_rowwise,
)
from .ops._flops import register_flop_formulas
from .recipes import RECIPES

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "ConversionReport",
    "Explanation",
    "FallbackError",
    "Recommendation",
    "SwitchBackConfig",
    "SwitchBackLinear",
    "SwitchBackLinearGlobal",
    "SwitchBackLinearGlobalMemEfficient",
    "SwitchBackLinearVectorwise",
    "conversion_report",
    "convert_to_switchback",
    "dequantize_rowwise",
    "explain",
    "install_as_bitsandbytes",
    "int8_matmul_mixed_dequantize",
    "int8_matmul_rowwise_dequantize",
    "precompute_absmax_for_fsdp",
    "quantize_columnwise_and_transpose",
    "quantize_global",
    "quantize_global_transpose",
    "quantize_global_with_transpose",
    "quantize_rowwise",
    "recommend",
    "register_flop_formulas",
    "revert_switchback",
    "switchback_linear",
]
