"""How each operation may be sharded, for DTensor: what is not here DTensor gathers first.

The layer itself does not need the rules for quantizers whose absmax spans shards: it all-reduces the absmax
(tensor_parallel.py), where DTensor would gather the tensor.
"""

from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

_OPS = torch.ops.torch_switchback
_R, _S0, _S1, _SUM = Replicate(), Shard(0), Shard(1), Partial("sum")

Rule = tuple[list[Any], list[Any]]  # placements of the outputs, of the arguments (None: not a tensor)


@register_sharding(_OPS.quantize_rowwise.default)
def _quantize_rowwise(x: Any) -> list[Rule]:
    return [([_R, _R], [_R]), ([_S0, _S0], [_S0])]


@register_sharding(_OPS.quantize_columnwise_and_transpose.default)
def _quantize_columnwise_and_transpose(x: Any) -> list[Rule]:
    return [([_R, _R], [_R]), ([_S0, _S0], [_S1])]


@register_sharding([_OPS.quantize_global.default, _OPS.quantize_global_transpose.default])
def _quantize_global(x: Any) -> list[Rule]:
    return [([_R, _R], [_R])]


@register_sharding(_OPS.quantize_transpose_by_absmax.default)
def _quantize_transpose_by_absmax(x: Any, absmax: Any) -> list[Rule]:
    return [([_R], [_R, _R]), ([_S1], [_S0, _R]), ([_S0], [_S1, _R])]


@register_sharding(_OPS.quantize_by_absmax.default)
def _quantize_by_absmax(x: Any, absmax: Any) -> list[Rule]:
    by_rows = _R if absmax.shape[0] == 1 else _S0
    return [([_R], [_R, _R]), ([_S0], [_S0, by_rows]), ([_S1], [_S1, _R])]


@register_sharding(_OPS.dequantize_rowwise.default)
def _dequantize_rowwise(x: Any, absmax: Any, out_dtype: Any) -> list[Rule]:
    return [([_R], [_R, _R, None]), ([_S0], [_S0, _S0, None]), ([_S1], [_S1, _R, None])]


@register_sharding([_OPS.int8_matmul_mixed_dequantize.default, _OPS.int8_matmul_rowwise_dequantize.default])
def _int8_matmul(a: Any, b: Any, state_x: Any, state_w: Any, bias: Any, out_dtype: Any) -> list[Rule]:
    by_columns = _R if state_w.shape[0] == 1 else _S0
    has_bias = bias is not None
    rules: list[Rule] = [
        ([_R], [_R, _R, _R, _R, _R if has_bias else None, None]),
        ([_S0], [_S0, _R, _S0, _R, _R if has_bias else None, None]),
        ([_S1], [_R, _S1, _R, by_columns, _S0 if has_bias else None, None]),
    ]
    if not has_bias:  # it would be added once a shard of the sum
        rules.append(([_SUM], [_S1, _S0, _R, _R, None, None]))
    return rules
