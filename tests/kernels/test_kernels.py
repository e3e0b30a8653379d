"""Every kernel, interpreted, against its operation's meaning in plain torch: the same bits."""

import warnings

import pytest
import torch

from testing import DTYPES, LAYOUTS, assert_same, pairwise, planned, random_int8
from torch_switchback import ops
from torch_switchback.kernels import (
    CannotCompile,
    _absmax,
    _matmul,
    int8_matmul,
    quantize_by_absmax,
    quantize_columnwise,
    quantize_global,
    quantize_rowwise,
)
from torch_switchback.ops import int8_matmul as int8_matmul_op
from torch_switchback.tuning import MatmulConfig

# NumPy, which interprets the kernels, warns of the NaN that the tests put in.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")

SHAPES = [(1, 1), (3, 5), (17, 83), (130, 67), (0, 4), (4, 0)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
matrices = pairwise(dtype=DTYPES, layout=LAYOUTS, shape=SHAPES)


def poisoned(*shape, dtype=torch.int8):
    """An output in which anything unwritten shows."""
    return torch.full(shape, 99, dtype=dtype)


def far_apart(rows, cols):
    """Random float16 rows, 128 of which span 2**31 elements, with pages between them that are never touched."""
    pitch = 2**24 + 1
    x = torch.empty(rows * pitch, dtype=torch.float16).as_strided((rows, cols), (pitch, 1))
    return x.copy_(torch.randn(rows, cols))


def truncate_to_bfloat16(x):
    """Convert float32 to bfloat16 as the interpreter does; a GPU rounds half to even."""
    return (x.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


@pytest.fixture(params=["one pass", "two passes"])
def passes(request, monkeypatch):
    """Both ways to an absmax that programs share: over all of a small x, or over what a first pass left."""
    if request.param == "two passes":
        monkeypatch.setattr(_absmax, "MAX_SMALL", 0)


def check_quantizer(launcher, op, x, qdata_shape, absmax_shape):
    out, absmax = poisoned(*qdata_shape), poisoned(*absmax_shape, dtype=torch.float32)
    launcher(x, out, absmax)
    expected_qdata, expected_absmax = op(x)
    assert_same(absmax, expected_absmax)
    assert_same(out, expected_qdata)


@matrices
def test_quantize_rowwise(dtype, layout, shape):
    x = layout(*shape, dtype)
    check_quantizer(planned(quantize_rowwise.plan_quantize_rowwise), ops.quantize_rowwise, x, shape, shape[:1])


@pytest.mark.parametrize("cols", [257, 640, 1100, 1280, 1536])
@layouts
def test_quantize_rowwise_of_rows_in_several_chunks(layout, cols):
    assert quantize_rowwise.row_tile(cols).CHUNKS > 1
    x = layout(9, cols, torch.bfloat16)
    check_quantizer(planned(quantize_rowwise.plan_quantize_rowwise), ops.quantize_rowwise, x, (9, cols), (9,))


def test_the_tile_of_a_row():
    for cols in range(16_385):
        tile = quantize_rowwise.row_tile(cols)
        lanes = tile.CHUNKS * tile.BLOCK_COLS
        assert lanes >= cols
        assert lanes <= cols + max(cols // 4, quantize_rowwise.SMALLEST_CHUNK)
        loads_16_bytes = tile.BLOCK_ROWS * tile.BLOCK_COLS >= 8 * 32 * tile.num_warps
        assert loads_16_bytes
    for cols in (640, 768, 1024, 1280, 4096, 5120, 14_336):
        tile = quantize_rowwise.row_tile(cols)
        assert tile.CHUNKS * tile.BLOCK_COLS == cols


@pytest.mark.parametrize("cols", [16_384, 16_385, 40_000])
def test_quantize_rowwise_of_rows_longer_than_a_block(cols):
    x = torch.randn(2, cols)
    check_quantizer(planned(quantize_rowwise.plan_quantize_rowwise), ops.quantize_rowwise, x, (2, cols), (2,))


@matrices
def test_quantize_columnwise_and_transpose(dtype, layout, shape, passes):
    rows, cols = shape
    check_quantizer(
        planned(quantize_columnwise.plan_quantize_columnwise_and_transpose),
        ops.quantize_columnwise_and_transpose,
        layout(*shape, dtype),
        (cols, rows),
        (cols,),
    )


def test_the_columns_of_rows_that_are_far_apart(monkeypatch):
    monkeypatch.setattr(_absmax, "MAX_SMALL", 0)
    monkeypatch.setattr(quantize_columnwise, "CTAS_PER_SM", 1)  # so that one does both tiles
    x = far_apart(130, 3)
    launcher = planned(quantize_columnwise.plan_quantize_columnwise_and_transpose)
    check_quantizer(launcher, ops.quantize_columnwise_and_transpose, x, (3, 130), (3,))


@matrices
def test_quantize_global(dtype, layout, shape, passes):
    check_quantizer(
        planned(quantize_global.plan_quantize_global), ops.quantize_global, layout(*shape, dtype), shape, (1,)
    )


@matrices
def test_quantize_global_transpose(dtype, layout, shape, passes):
    x = layout(*shape, dtype)
    check_quantizer(
        planned(quantize_global.plan_quantize_global_transpose), ops.quantize_global_transpose, x, shape[::-1], (1,)
    )
    expected, absmax = ops.quantize_global_transpose(x)
    out = poisoned(*shape[::-1])
    planned(quantize_global.plan_quantize_transpose_by_absmax)(x, absmax, out)
    assert_same(out, expected)


@matrices
def test_quantize_global_with_transpose(dtype, layout, shape, passes):
    x = layout(*shape, dtype)
    out, out_t, absmax = poisoned(*shape), poisoned(*shape[::-1]), poisoned(1, dtype=torch.float32)
    planned(quantize_global.plan_quantize_global_with_transpose)(x, out, out_t, absmax)
    for actual, expected in zip((out, out_t, absmax), ops.quantize_global_with_transpose(x), strict=True):
        assert_same(actual, expected)


@matrices
@pytest.mark.parametrize("by_row", [False, True])
def test_quantize_by_absmax(by_row, dtype, layout, shape):
    x = layout(*shape, dtype)
    _, absmax = (ops.quantize_rowwise if by_row else ops.quantize_global)(x)
    out = poisoned(*shape)
    planned(quantize_by_absmax.plan_quantize_by_absmax)(x, absmax, out)
    assert_same(out, ops.quantize_by_absmax(x, absmax))


def test_quantize_by_absmax_of_rows_longer_than_a_block():
    x = torch.randn(7, 2500)
    out, absmax = poisoned(7, 2500), (torch.rand(14) + 5)[::2]
    planned(quantize_by_absmax.plan_quantize_by_absmax)(x, absmax, out)
    assert_same(out, ops.quantize_by_absmax(x, absmax))


def test_a_nan_of_either_sign_passes_quantize_transpose_by_absmax():
    negative_nan = torch.tensor([-1], dtype=torch.int32).view(torch.float32)
    out = poisoned(5, 3)
    planned(quantize_global.plan_quantize_transpose_by_absmax)(torch.randn(3, 5), negative_nan, out)
    assert not out.any()


@shapes
@dtypes
def test_dequantize_rowwise(dtype, shape):
    rows, cols = shape
    absmax = torch.rand(rows)
    absmax[1:2] = float("nan")
    for x in (random_int8(rows, cols), random_int8(cols, rows).t()):
        out = poisoned(rows, cols, dtype=dtype)
        planned(quantize_rowwise.plan_dequantize_rowwise)(x, absmax, dtype, out)
        if dtype == torch.bfloat16:
            x = x.clone()
            finite = truncate_to_bfloat16(ops.dequantize_rowwise(x, absmax.nan_to_num(0), torch.float32))
            assert torch.equal(out.isnan(), absmax.isnan()[:, None].expand(rows, cols))
            assert_same(out.nan_to_num(0), finite)
        else:
            assert_same(out, ops.dequantize_rowwise(x, absmax, dtype))


CONFIGS = {
    "tma": MatmulConfig("tma", 32, 32, 32, group_m=2, num_stages=2, num_warps=4, ctas_per_sm=2),
    "tma wide": MatmulConfig("tma", 16, 64, 64, group_m=3, num_stages=2, num_warps=4),
    "pointer": MatmulConfig("pointer", 32, 32, 32, group_m=2, num_stages=2, num_warps=4),
    "pointer tall": MatmulConfig("pointer", 64, 16, 64, group_m=3, num_stages=2, num_warps=4),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

# The outputs of the first five fit TMA, of which two have their operands copied.
MATMULS = [
    *[(64, 96, 64), (33, 48, 80), (150, 64, 112), (33, 48, 83), (1, 16, 5)],
    *[(1, 1, 1), (17, 83, 5), (70, 65, 129), (0, 4, 4), (4, 4, 0)],
]


@pairwise(dtype=DTYPES, has_bias=[False, True], rowwise=[False, True], shape=MATMULS, config=CONFIGS)
def test_matmuls(dtype, has_bias, rowwise, shape, config):
    m, n, k = shape
    a, b = random_int8(m, k), random_int8(n, k).t()
    absmax_a, absmax_b = torch.rand(m), torch.rand(n if rowwise else 1)
    bias = torch.randn(n) if has_bias else None
    out = poisoned(m, n, dtype=dtype)
    planned(int8_matmul.plan_int8_matmul, absmax_per_col=rowwise, config=CONFIGS[config])(
        a, b, absmax_a, absmax_b, bias, out.dtype, out
    )
    op = ops.int8_matmul_rowwise_dequantize if rowwise else ops.int8_matmul_mixed_dequantize
    if dtype == torch.bfloat16:
        assert_same(out, truncate_to_bfloat16(op(a, b, absmax_a, absmax_b, bias, torch.float32)))
    else:
        assert_same(out, op(a, b, absmax_a, absmax_b, bias, dtype))


@configs
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
def test_a_negative_zero_keeps_its_sign_where_there_is_no_bias(has_bias, config):
    a, b = torch.full((5, 64), -1, dtype=torch.int8), torch.ones(64, 16, dtype=torch.int8)
    tiny = torch.full((5,), 1e-30)  # whose products with each other are 0
    bias = torch.zeros(16) if has_bias else None
    out = poisoned(5, 16, dtype=torch.float32)
    planned(int8_matmul.plan_int8_matmul, absmax_per_col=False, config=config)(
        a, b, tiny, tiny[:1], bias, out.dtype, out
    )
    expected = ops.int8_matmul_mixed_dequantize(a, b, tiny, tiny[:1], bias, torch.float32)
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32))
    assert bool(out.signbit().all()) is not has_bias


@pytest.mark.parametrize("inner", [133_144, 133_145, 133_152, 262_144])
def test_matmuls_that_int32_cannot_hold(inner):
    config = MatmulConfig("tma", 16, 16, 8192, group_m=1, num_stages=2, num_warps=4)
    a = torch.full((2, inner), 127, dtype=torch.int8)
    a[1] = -127
    ones = torch.full((3,), 127.0)
    out = poisoned(2, 3, dtype=torch.float32)
    b = torch.full((3, inner), 127, dtype=torch.int8).t()
    planned(int8_matmul.plan_int8_matmul, absmax_per_col=False, config=config)(
        a, b, ones[:2], ones[:1], None, out.dtype, out
    )
    assert_same(out, (a.long() @ b.long()).float())


def test_the_launchers_of_both_matmuls_pass_their_arguments_on():
    a, b, out = random_int8(5, 64), random_int8(7, 64).t(), poisoned(5, 7, dtype=torch.float32)
    absmax_a, absmax_b = torch.rand(5), torch.rand(7)
    planned(int8_matmul.plan_int8_matmul_rowwise_dequantize)(a, b, absmax_a, absmax_b, None, torch.float32, out)
    assert_same(out, ops.int8_matmul_rowwise_dequantize(a, b, absmax_a, absmax_b, None, torch.float32))
    planned(int8_matmul.plan_int8_matmul_mixed_dequantize)(a, b, absmax_a, absmax_b[:1], None, torch.float32, out)
    assert_same(out, ops.int8_matmul_mixed_dequantize(a, b, absmax_a, absmax_b[:1], None, torch.float32))


def test_the_kernel_carries_sums_no_later_than_the_cpu():
    assert _matmul.K_CHUNK <= int8_matmul_op.MAX_INT32_INNER


def test_a_kernel_that_cannot_run_gives_way_to_a_plainer_one(monkeypatch):
    config = MatmulConfig("warp_specialized", 128, 256, 128, group_m=8, num_stages=4, num_warps=8)
    monkeypatch.setattr(int8_matmul, "matmul_config", lambda *args, **kwargs: config)
    monkeypatch.setattr(int8_matmul, "_replaced", {})
    a, b, absmax = random_int8(16, 32), random_int8(48, 32).t(), torch.rand(16)
    out = torch.empty(16, 48)
    expected = ops.int8_matmul_mixed_dequantize(a, b, absmax, absmax[:1], None, torch.float32)
    with pytest.warns(UserWarning, match="instead of .*warp_specialized.* the interpreter does not run Gluon"):
        planned(int8_matmul.plan_int8_matmul_mixed_dequantize)(a, b, absmax, absmax[:1], None, torch.float32, out)
    assert_same(out, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned(int8_matmul.plan_int8_matmul_mixed_dequantize)(a, b, absmax, absmax[:1], None, torch.float32, out)
    with pytest.raises(CannotCompile):
        planned(int8_matmul.plan_int8_matmul, absmax_per_col=False, config=config)(
            a, b, absmax, absmax[:1], None, out.dtype, out
        )
