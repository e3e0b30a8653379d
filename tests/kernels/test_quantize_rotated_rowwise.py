"""The row-wise quantizer that rotates the columns, interpreted, against its meaning in plain torch, for every tile."""

import pytest
import torch
from test_kernels import poisoned

import torch_switchback as ts
from testing import DTYPES, LAYOUTS, assert_same, assert_same_within_one_step, planned
from torch_switchback.kernels import quantize_rotated_rowwise
from torch_switchback.kernels.quantize_rotated_rowwise import MAX_HELD, rotated_row_tile

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")

layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def check(x, block, exact=False):
    expected = ts.ops.quantize_rowwise(x, rotate_features=block)
    out = tuple(poisoned(*tensor.shape, dtype=tensor.dtype) for tensor in expected)
    planned(quantize_rotated_rowwise.plan_quantize_rotated_rowwise)(x, block, *out)
    assert_same_within_one_step(out, expected)
    if exact:
        for actual, wanted in zip(out, expected, strict=True):
            assert_same(actual, wanted)


@layouts
@dtypes
def test_every_layout(dtype, layout):
    check(layout(19, 83, dtype), 16)


@pytest.mark.parametrize("shape", [(1, 1), (256, 64), (5, 70), (4, 0), (0, 4), (3, 1290), (2, 14_336)], ids=str)
def test_every_shape(shape):
    check(torch.randn(shape), 32)


@pytest.mark.parametrize("block", [64, 128])
def test_every_block(block):
    check(torch.randn(9, 3 * block + 1).bfloat16(), block)


@dtypes
@pytest.mark.parametrize("block", [16, 64])  # whose square roots are powers of two
def test_sums_that_are_exact_are_the_same_in_any_order(block, dtype):
    check(torch.randint(-128, 129, (9, 150)).to(dtype), block, exact=True)


@pytest.mark.parametrize(("held", "max_held"), [(4096, 4096), (8192, 16_384), (4096, 0)])
def test_tiles_do_not_matter(held, max_held, monkeypatch):
    """The last one holds no row: it is read twice."""
    monkeypatch.setattr(quantize_rotated_rowwise, "HELD", held)
    monkeypatch.setattr(quantize_rotated_rowwise, "MAX_HELD", max_held)
    rotated_row_tile.cache_clear()
    try:
        assert (rotated_row_tile(4200, 64, 4).TILES == 0) == (max_held < 2 * 4096)
        check(torch.randn(5, 4200), 64)
    finally:
        rotated_row_tile.cache_clear()


@pytest.mark.parametrize("size", [64, 128])
def test_programs_hold_no_more_than_they_may(size):
    for cols in range(0, 30_000, 97):
        tile = rotated_row_tile(cols, size, 4)
        held = tile.TILES * tile.TILE_ROWS * size
        assert held <= MAX_HELD
        assert tile.TILE_ROWS % tile.ACROSS == 0
        assert tile.TILES == 0 or tile.TILES * tile.ACROSS * size >= cols
        assert tile.TILES > 0 or cols > MAX_HELD - 64 * size
