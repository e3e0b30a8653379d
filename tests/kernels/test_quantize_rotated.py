"""The rotating quantizers, interpreted, against their meaning in plain torch, for every tile."""

import pytest
import torch
from test_kernels import far_apart, poisoned

from testing import DTYPES, LAYOUTS, assert_same, assert_same_within_one_step, planned
from torch_switchback import ops
from torch_switchback.kernels import quantize_rotated

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")

layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def check(x, block, exact=False):
    expected = ops.quantize_rowwise_and_rotated_columnwise(x, block)
    out = [poisoned(*tensor.shape, dtype=tensor.dtype) for tensor in expected]
    planned(quantize_rotated.plan_quantize_rowwise_and_rotated_columnwise)(x, block, *out)
    alone = [poisoned(*tensor.shape, dtype=tensor.dtype) for tensor in expected[2:]]
    planned(quantize_rotated.plan_quantize_rotated_columnwise_and_transpose)(x, block, *alone)
    for actual, wanted in zip(out[:2], expected[:2], strict=True):
        assert_same(actual, wanted)
    for columns in (out[2:], alone):
        assert_same_within_one_step(columns, expected[2:])
        if exact:
            assert_same(columns[0], expected[2])
            assert_same(columns[1], expected[3])


@layouts
@dtypes
def test_every_layout(dtype, layout):
    check(layout(19, 21, dtype), 16)


@pytest.mark.parametrize("shape", [(1, 1), (64, 256), (70, 5), (0, 4), (4, 0)], ids=str)
def test_every_shape(shape):
    check(torch.randn(shape), 32)


@pytest.mark.parametrize("block", [64, 128])
def test_every_block(block):
    check(torch.randn(block + 1, 9).bfloat16(), block)


@dtypes
@pytest.mark.parametrize("block", [16, 64])  # whose square roots are powers of two
def test_sums_that_are_exact_are_the_same_in_any_order(block, dtype):
    check(torch.randint(-128, 129, (150, 9)).to(dtype), block, exact=True)


def test_float32_is_rotated_whole():
    """Its last bits count as well: what differs here needs three bfloat16 parts."""
    x = torch.randint(-(2**17), 2**17, (64, 9)).float()
    check(x, 64, exact=True)


@pytest.mark.parametrize(("tile_rows", "tile", "programs"), [(64, 1024, 1), (128, 4096, 16)])
def test_tiles_do_not_matter(tile_rows, tile, programs, monkeypatch):
    monkeypatch.setattr(quantize_rotated, "TILE_ROWS", tile_rows)
    monkeypatch.setattr(quantize_rotated, "TILE", tile)
    monkeypatch.setattr(quantize_rotated, "CTAS_PER_SM", programs)
    check(torch.randn(300, 40), 16)


def test_rows_that_are_far_apart(monkeypatch):
    monkeypatch.setattr(quantize_rotated, "CTAS_PER_SM", 1)  # so that one does both tiles
    check(far_apart(130, 3), 128)
