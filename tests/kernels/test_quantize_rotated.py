"""The rotating quantisers, interpreted, against their meaning in plain torch: the same bits for every tile."""

import pytest
import torch
from test_kernels import poisoned

from cases import DTYPES, LAYOUTS, assert_same
from torch_switchback import ops
from torch_switchback.kernels import quantize_rotated

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")

layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def check(x, block):
    expected = ops.quantize_rowwise_and_rotated_columnwise(x, block)
    out = [poisoned(*tensor.shape, dtype=tensor.dtype) for tensor in expected]
    quantize_rotated.quantize_rowwise_and_rotated_columnwise(x, block, *out)
    for actual, wanted in zip(out, expected, strict=True):
        assert_same(actual, wanted)
    alone = [poisoned(*tensor.shape, dtype=tensor.dtype) for tensor in expected[2:]]
    quantize_rotated.quantize_rotated_columnwise_and_transpose(x, block, *alone)
    for actual, wanted in zip(alone, expected[2:], strict=True):
        assert_same(actual, wanted)


@pytest.mark.promise(
    "codes and absmax", "slices, transposes, expanded, storage offsets", "a NaN beside transposed codes"
)
@layouts
@dtypes
def test_every_layout(dtype, layout):
    check(layout(19, 21, dtype), 16)


@pytest.mark.promise("codes and absmax")
@pytest.mark.parametrize("shape", [(1, 1), (64, 256), (70, 5), (0, 4), (4, 0)], ids=str)
def test_every_shape(shape):
    check(torch.randn(shape), 32)


@pytest.mark.promise("codes and absmax")
@pytest.mark.parametrize("block", [64, 128])
def test_every_block(block):
    check(torch.randn(block + 1, 9).bfloat16(), block)


@pytest.mark.promise("every tile configuration")
@pytest.mark.parametrize("tile", [(32, 512), (16, 256)], ids=str)
def test_tiles_do_not_matter(tile, monkeypatch):
    monkeypatch.setattr(quantize_rotated, "TILE_ROWS", tile[0])
    monkeypatch.setattr(quantize_rotated, "TILE", tile[1])
    check(torch.randn(50, 40), 16)
