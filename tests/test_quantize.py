"""The meaning of the quantizers, against formulas written another way, in float64 and integers."""

import pytest
import torch

import torch_switchback as ts
from testing import DTYPES, LAYOUTS, SHAPES, assert_same, contiguous, hostile
from torch_switchback import ops
from torch_switchback.ops._numerics import quantize_traceably

layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def expected_qdata(x, absmax):
    """rint(x * (127 / absmax)) with each float32 rounding done by rounding an exact float64 result."""
    absmax = absmax.double()
    usable = (absmax >= 2.0**-121) & (absmax < float("inf"))
    inverse = torch.where(usable, (127.0 / torch.where(usable, absmax, 1.0)).float().double(), 0.0)
    scaled = (x.double() * inverse).float()  # 24-bit factors: exact in float64 before the one rounding
    return torch.where(usable, scaled, 0.0).round().to(torch.int8)


def absmax_over(x, dim):
    if x.shape[dim] == 0:
        return torch.zeros(x.shape[1 - dim], device=x.device)
    return x.float().abs().amax(dim)


@shapes
@layouts
@dtypes
def test_rowwise(dtype, layout, shape, device):
    x = layout(*shape, dtype, device)
    qdata, absmax = ts.ops.quantize_rowwise(x)
    assert_same(absmax, absmax_over(x, 1))
    assert_same(qdata, expected_qdata(x, absmax[:, None]))


@pytest.mark.parametrize("layout", [contiguous, hostile], ids=lambda layout: layout.__name__)
@shapes
@dtypes
def test_rowwise_for_a_compiler(dtype, shape, layout, device):
    x = layout(*shape, dtype, device)
    qdata, absmax = ts.ops.quantize_rowwise(x)
    assert_same(quantize_traceably(x, absmax[:, None]), qdata)


def test_what_a_compiler_did_not_round_stays_within_the_int8_values(device):
    x, absmax = torch.tensor([[1.5, -2.0]], device=device), torch.tensor([[1.0]], device=device)
    assert quantize_traceably(x, absmax).tolist() == [[127, -127]]


@shapes
@layouts
@dtypes
def test_columnwise_and_transpose(dtype, layout, shape, device):
    x = layout(*shape, dtype, device)
    qdata, absmax = ts.ops.quantize_columnwise_and_transpose(x)
    assert_same(absmax, absmax_over(x, 0))
    assert_same(qdata, expected_qdata(x, absmax).t().contiguous())


@shapes
@layouts
@dtypes
def test_global_plain_and_transposed(dtype, layout, shape, device):
    x = layout(*shape, dtype, device)
    qdata, absmax = ts.ops.quantize_global(x)
    assert_same(absmax, absmax_over(x.reshape(1, -1), 1))
    assert_same(qdata, expected_qdata(x, absmax))
    qdata_t, absmax_t = ts.ops.quantize_global_transpose(x)
    assert_same(absmax_t, absmax)
    assert_same(qdata_t, qdata.t().contiguous())
    assert_same(ops.quantize_transpose_by_absmax(x, absmax), qdata_t)
    for actual, expected in zip(ts.ops.quantize_global_with_transpose(x), (qdata, qdata_t, absmax), strict=True):
        assert_same(actual, expected)


@shapes
@layouts
@dtypes
def test_by_absmax_is_the_quantizer_that_found_it(dtype, layout, shape, device):
    """Also for parts of x, by the absmax of all of it."""
    x = layout(*shape, dtype, device)
    for quantize in (ts.ops.quantize_global, ts.ops.quantize_rowwise):
        qdata, absmax = quantize(x)
        assert_same(ops.quantize_by_absmax(x, absmax), qdata)
        upper = slice(0, shape[0] // 2)
        of_upper = absmax if quantize is ts.ops.quantize_global else absmax[upper]
        assert_same(ops.quantize_by_absmax(x[upper], of_upper), qdata[upper])


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 5), (2, 0, 5)])
def test_global_takes_any_shape(shape, device):
    x = torch.randn(shape, device=device)
    qdata, absmax = ts.ops.quantize_global(x)
    assert qdata.shape == x.shape
    assert absmax.shape == (1,)


@dtypes
def test_dequantize_is_the_inverse_to_half_a_step(dtype, device):
    x = torch.randn(64, 300, device=device)
    qdata, absmax = ts.ops.quantize_rowwise(x)
    back = ts.ops.dequantize_rowwise(qdata, absmax, dtype)
    assert back.dtype == dtype
    rounding = torch.finfo(dtype).eps * x.abs()
    assert ((back.float() - x).abs() <= absmax[:, None] / 254 * (1 + 1e-6) + rounding).all()


def test_dequantize_gives_float16_unless_told(device):
    qdata, absmax = ts.ops.quantize_rowwise(torch.randn(2, 3, device=device))
    assert ts.ops.dequantize_rowwise(qdata, absmax).dtype == torch.float16


def test_dequantize_carries_nan_and_inf(device):
    qdata, absmax = ts.ops.quantize_rowwise(torch.tensor([[1.0, float("nan")], [float("inf"), 0.0]], device=device))
    assert not ts.ops.dequantize_rowwise(qdata, absmax, torch.float32).isfinite().any()


@pytest.mark.parametrize("exponent", [-100, -20, 0, 20, 100])
def test_a_power_of_two_leaves_the_int8_values(exponent, device):
    x = torch.randn(8, 100, device=device)
    qdata, _ = ts.ops.quantize_rowwise(x)
    assert torch.equal(ts.ops.quantize_rowwise(x * 2.0**exponent)[0], qdata)


def test_the_flush_limit_is_where_127_over_absmax_overflows(device):
    limit = 2.0**-121
    below = torch.nextafter(torch.tensor(limit), torch.tensor(0.0)).item()
    qdata, absmax = ts.ops.quantize_rowwise(torch.tensor([[limit, limit / 2], [below, below / 2]], device=device))
    assert qdata.tolist() == [[127, 64], [0, 0]]
    assert absmax.tolist() == [limit, below]


@pytest.mark.parametrize("row", [1_048_577])
def test_a_row_of_a_million(row, device):
    x = contiguous(2, row, torch.bfloat16, device)
    qdata, absmax = ts.ops.quantize_rowwise(x)
    assert_same(qdata, expected_qdata(x, absmax[:, None]))


def test_the_default_dtype_does_not_matter(device):
    torch.set_default_dtype(torch.float64)
    try:
        for shape in ((3, 4), (0, 4)):
            x = torch.zeros(shape, dtype=torch.float32, device=device)
            for quantizer in (ops.quantize_rowwise, ops.quantize_columnwise_and_transpose, ops.quantize_global):
                assert quantizer(x)[1].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


MATRIX_QUANTIZERS = [
    ts.ops.quantize_rowwise,
    ts.ops.quantize_columnwise_and_transpose,
    ts.ops.quantize_global_transpose,
]


@pytest.mark.parametrize("quantizer", MATRIX_QUANTIZERS, ids=lambda f: f.__name__)
def test_only_matrices(quantizer, device):
    with pytest.raises(ValueError, match=rf"{quantizer.__name__}: \w+ must be 2-D, got \(3, 4, 5\)"):
        quantizer(torch.randn(3, 4, 5, device=device))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int8, torch.bool], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("quantizer", [ts.ops.quantize_global, *MATRIX_QUANTIZERS], ids=lambda f: f.__name__)
def test_only_floats(quantizer, dtype, device):
    with pytest.raises(
        TypeError, match=rf"{quantizer.__name__}: \w+ must be float16, bfloat16 or float32, got {dtype}"
    ):
        quantizer(torch.zeros(3, 4, device=device, dtype=dtype))


def test_dequantize_refuses_what_does_not_fit(device):
    qdata, absmax = ts.ops.quantize_rowwise(torch.randn(2, 3, device=device))
    with pytest.raises(TypeError, match=r"x must be int8, got torch\.float32"):
        ts.ops.dequantize_rowwise(qdata.float(), absmax)
    with pytest.raises(TypeError, match=r"absmax must be float32, got torch\.float16"):
        ts.ops.dequantize_rowwise(qdata, absmax.half())
    with pytest.raises(ValueError, match=r"absmax must have shape \(2,\), got \(1,\)"):
        ts.ops.dequantize_rowwise(qdata, absmax[:1])
    with pytest.raises(TypeError, match=r"out_dtype must be float16, bfloat16 or float32, got torch\.float64"):
        ts.ops.dequantize_rowwise(qdata, absmax, torch.float64)
    with pytest.raises(ValueError, match="absmax is on meta"):
        ts.ops.dequantize_rowwise(qdata, absmax.to("meta"))
