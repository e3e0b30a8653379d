"""The INT8 matmuls against int64 sums and a float32 epilogue written out."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import torch_switchback as ts
from testing import DTYPES, assert_same, random_int8
from torch_switchback.ops import int8_matmul

SHAPES = [(1, 1, 1), (17, 83, 257), (64, 96, 128), (130, 260, 1000), (5, 7, 1), (0, 4, 8), (4, 0, 8), (4, 8, 0)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def exact(a, b):
    return (a.cpu().long() @ b.cpu().long()).to(a.device)


def expected(a, b, state_x, state_w, bias, dtype):
    third = torch.tensor(1.0 / 127.0, dtype=torch.float32, device=a.device)
    scale = (state_x * third)[:, None] * (state_w * third)
    out = exact(a, b).to(torch.float32) * scale
    return (out if bias is None else out + bias.float()).to(dtype)


@shapes
@dtypes
@pytest.mark.parametrize("bias", [None, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rowwise", [False, True], ids=["mixed", "rowwise"])
def test_matmul(rowwise, bias, dtype, shape, device):
    m, n, k = shape
    a, b = random_int8(m, k, device), random_int8(n, k, device).t()
    state_x, state_w = torch.rand(m, device=device), torch.rand(n if rowwise else 1, device=device)
    bias = None if bias is None else torch.randn(n, device=device).to(bias)
    product = ts.ops.int8_matmul_rowwise_dequantize if rowwise else ts.ops.int8_matmul_mixed_dequantize
    assert_same(product(a, b, state_x, state_w, bias, dtype), expected(a, b, state_x, state_w, bias, dtype))


def test_any_strides(device):
    m, n, k = 33, 65, 130
    a, b = random_int8(m, 2 * k, device)[:, ::2], random_int8(k, n, device)
    state_x, state_w = torch.rand(2 * m, device=device)[::2], torch.rand(1, device=device)
    out = ts.ops.int8_matmul_mixed_dequantize(a, b, state_x, state_w, None, torch.float32)
    assert_same(out, expected(a, b, state_x, state_w, None, torch.float32))
    column = random_int8(1, k, device).expand(n, k).t()
    out = ts.ops.int8_matmul_mixed_dequantize(a, column, state_x, state_w, None, torch.float32)
    assert_same(out, expected(a, column, state_x, state_w, None, torch.float32))
    row = random_int8(1, k, device).expand(m, k)
    out = ts.ops.int8_matmul_mixed_dequantize(row, b, state_x, state_w, None, torch.float32)
    assert_same(out, expected(row, b, state_x, state_w, None, torch.float32))
    row = random_int8(k, 1, device).t()  # contiguous, says PyTorch, with strides (1, 1)
    out = ts.ops.int8_matmul_mixed_dequantize(row, b, state_x[:1], state_w, None, torch.float32)
    assert_same(out, expected(row, b, state_x[:1], state_w, None, torch.float32))


@pytest.mark.parametrize("inner", [133_144, 133_145, 262_144])
def test_sums_that_int32_cannot_hold(inner, device):
    a = torch.full((2, inner), 127, dtype=torch.int8, device=device)
    a[1] = -127
    b = torch.full((inner, 3), 127, dtype=torch.int8, device=device)
    ones = torch.full((2,), 127.0, device=device)
    out = ts.ops.int8_matmul_mixed_dequantize(a, b, ones, ones[:1], None, torch.float32)
    assert_same(out, expected(a, b, ones, ones[:1], None, torch.float32))
    assert out[0, 0].item() == pytest.approx(127.0**2 * inner, rel=1e-6)


def test_float16_result_overflows_to_inf_and_others_do_not(device):
    a = torch.full((1, 64), 127, dtype=torch.int8, device=device)
    absmax = torch.tensor([127.0], device=device)
    for dtype, finite in ((torch.float16, False), (torch.bfloat16, True), (torch.float32, True)):
        out = ts.ops.int8_matmul_mixed_dequantize(a, a.t(), absmax, absmax, None, dtype)
        assert out.isfinite().item() == finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_absmax_that_is_not_finite_carries(value, device):
    a, b = random_int8(4, 32, device), random_int8(8, 32, device).t()
    a[1] = 0  # what the quantizers give such a row
    state_x, state_w = torch.rand(4, device=device), torch.rand(8, device=device)
    state_x[1] = value
    state_w[5] = value
    b.t()[5] = 0
    finite = ts.ops.int8_matmul_rowwise_dequantize(a, b, state_x, state_w, None, torch.float32).isfinite()
    assert not finite[1].any()
    assert not finite[:, 5].any()
    assert finite.sum() == 3 * 7


def test_float16_unless_told(device):
    a, absmax = random_int8(2, 16, device), torch.rand(2, device=device)
    assert ts.ops.int8_matmul_mixed_dequantize(a, a.t(), absmax, absmax[:1], None).dtype == torch.float16
    assert ts.ops.int8_matmul_rowwise_dequantize(a, a.t(), absmax, absmax).dtype == torch.float16


def test_refuses_what_does_not_fit(device):
    a, b = random_int8(2, 16, device), random_int8(16, 3, device)
    state_x, state_w, bias = torch.rand(2, device=device), torch.rand(1, device=device), torch.rand(3, device=device)
    product = ts.ops.int8_matmul_mixed_dequantize
    for error, message, arguments in [
        (TypeError, "a must be int8", (a.float(), b, state_x, state_w, bias)),
        (TypeError, "b must be int8", (a, b.int(), state_x, state_w, bias)),
        (ValueError, "a must be 2-D", (a[0], b, state_x, state_w, bias)),
        (ValueError, r"b must have 16 rows, .*got \(3, 16\)", (a, b.t(), state_x, state_w, bias)),
        (TypeError, "state_x must be float32", (a, b, state_x.half(), state_w, bias)),
        (ValueError, r"state_x must have shape \(2,\)", (a, b, state_w, state_w, bias)),
        (ValueError, r"state_w must have shape \(1,\)", (a, b, state_x, bias, bias)),
        (TypeError, "bias must be float16, bfloat16 or float32", (a, b, state_x, state_w, bias.double())),
        (ValueError, r"bias must have shape \(3,\)", (a, b, state_x, state_w, state_x)),
        (TypeError, "out_dtype", (a, b, state_x, state_w, bias, torch.int8)),
        (ValueError, "b is on meta", (a, b.to("meta"), state_x, state_w, bias)),
    ]:
        with pytest.raises(error, match=f"int8_matmul_mixed_dequantize: {message}"):
            product(*arguments)
    with pytest.raises(ValueError, match=r"int8_matmul_rowwise_dequantize: state_w must have shape \(3,\)"):
        ts.ops.int8_matmul_rowwise_dequantize(a, b, state_x, state_w, bias)


@shapes
def test_both_ways_to_an_exact_matmul_on_the_cpu(shape):
    m, n, k = shape
    for a, b in (
        (random_int8(m, k), random_int8(k, n)),
        (torch.full((m, k), -127, dtype=torch.int8), random_int8(k, n)),
    ):
        assert torch.equal(int8_matmul._exact_matmul(a, b).long(), exact(a, b))
        assert torch.equal(int8_matmul._exact_matmul_in_float(a, b).long(), exact(a, b))


@pytest.mark.parametrize("inner", [1, 512])
def test_autocast_does_not_reach_the_integers(inner, monkeypatch):
    a, b = random_int8(32, inner), random_int8(inner, 48)
    for trusted in (True, False):
        monkeypatch.setattr(int8_matmul, "_int_mm_is_exact", lambda trusted=trusted: trusted)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(int8_matmul._exact_matmul(a, b).long(), exact(a, b))


def test_the_probe_of_int_mm_may_be_the_first_call_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = int8_matmul._int_mm_is_exact.__wrapped__()
    assert under_autocast == int8_matmul._int_mm_is_exact.__wrapped__()


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode], ids=["meta", "fake"])
def test_the_probe_of_int_mm_may_be_the_first_call_while_a_model_is_built_without_memory(mode):
    with mode():
        found = int8_matmul._int_mm_is_exact.__wrapped__()
    assert found == int8_matmul._int_mm_is_exact.__wrapped__()


def test_int_mm_is_not_trusted_where_it_saturates(monkeypatch):
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.float() @ b.float()).clamp(-32768, 32767).int())
    assert not int8_matmul._int_mm_is_exact.__wrapped__()
