"""The operations for callers that have checked their arguments: no checks and, where it makes no difference, no
dispatcher, which takes longer than a kernel's launch."""

from .column_sums import column_sums_op
from .int8_matmul import int8_matmul_mixed_dequantize_op, int8_matmul_rowwise_dequantize_op
from .quantize_by_absmax import quantize_by_absmax_op
from .quantize_columnwise import (
    quantize_columnwise_and_transpose_op,
    quantize_rotated_columnwise_and_transpose_op,
    quantize_rowwise_and_rotated_columnwise_op,
)
from .quantize_global import (
    quantize_global_op,
    quantize_global_with_transpose_op,
    quantize_transpose_by_absmax_op,
)
from .quantize_rowwise import dequantize_rowwise_op, quantize_rotated_rowwise_op, quantize_rowwise_op

column_sums = column_sums_op.direct
dequantize_rowwise = dequantize_rowwise_op.direct
int8_matmul_mixed_dequantize = int8_matmul_mixed_dequantize_op.direct
int8_matmul_rowwise_dequantize = int8_matmul_rowwise_dequantize_op.direct
quantize_by_absmax = quantize_by_absmax_op.direct
quantize_columnwise_and_transpose = quantize_columnwise_and_transpose_op.direct
quantize_global = quantize_global_op.direct
quantize_global_with_transpose = quantize_global_with_transpose_op.direct
quantize_rotated_columnwise_and_transpose = quantize_rotated_columnwise_and_transpose_op.direct
quantize_rotated_rowwise = quantize_rotated_rowwise_op.direct
quantize_rowwise = quantize_rowwise_op.direct
quantize_rowwise_and_rotated_columnwise = quantize_rowwise_and_rotated_columnwise_op.direct
quantize_transpose_by_absmax = quantize_transpose_by_absmax_op.direct
