"""The absmaxes of shards are those that the quantizers find, to the bit; NaN and Inf among them."""

import pytest
import torch

import torch_switchback as ts
from testing import DTYPES, LAYOUTS, SHAPES, assert_same
from torch_switchback.distributed.absmax import absmax_bits, foreach_absmax_bits

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@shapes
@layouts
@dtypes
def test_absmax_bits(dtype, layout, shape, device):
    x = layout(*shape, dtype, device)
    for actual, (_, expected) in (
        (absmax_bits(x), ts.ops.quantize_global(x)),
        (absmax_bits(x, 1), ts.ops.quantize_rowwise(x)),
        (absmax_bits(x, 0), ts.ops.quantize_columnwise_and_transpose(x)),
    ):
        assert actual.dtype == torch.int32
        assert_same(actual.view(torch.float32), expected)


@dtypes
def test_of_several_tensors(dtype, device):
    tensors = [layout(*shape, dtype, device) for layout in LAYOUTS for shape in SHAPES]
    for x, actual in zip(tensors, foreach_absmax_bits(tensors), strict=True):
        assert_same(actual.view(torch.float32), ts.ops.quantize_global(x)[1])
    assert foreach_absmax_bits([]) == []


def test_nan_is_above_everything():
    bits = absmax_bits(torch.tensor([[3e38], [float("inf")], [-float("nan")], [0.0]]), 1)
    assert bits.argsort().tolist() == [3, 0, 1, 2]
