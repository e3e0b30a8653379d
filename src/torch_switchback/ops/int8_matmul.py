"""INT8 matmuls with fused dequantization: int8 × int8 → int32 → × scales, + bias → float.

The sum is exact in integers. Then come, in float32, one product with the product of the two scales, one sum with the
bias, and one rounding to the output's dtype. A NaN or an Inf in an absmax reaches every element that it scales.
"""

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..kernels.device import empty
from ._library import define
from ._numerics import ONE_OVER_127, row_blocks
from ._validation import check_2d, check_dtype, check_float, check_out_dtype, check_same_device, check_shape

# 127² * 133,144 < 2**31 <= 127² * 133,145: up to here int32 holds every sum of products of int8 values.
MAX_INT32_INNER = 133_144


def int8_matmul_mixed_dequantize(
    a: Tensor,
    b: Tensor,
    state_x: Tensor,
    state_w: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Return ``(a @ b) * (state_x / 127) * (state_w / 127) + bias`` with one absmax for all of b.

    arXiv 2304.13013, algorithm 1 (equation 3).

    Args:
        a: int8 values [M, K].
        b: int8 values [K, N]; K contiguous (a ``.t()`` view) is the fast one.
        state_x: float32 [M], the absmax of each row of a.
        state_w: float32 (1,), the absmax of b.
        bias: [N], float16, bfloat16 or float32, or None.
        out_dtype: float16 (bitsandbytes' choice), bfloat16 or float32.

    Returns:
        [M, N] in out_dtype.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: shapes do not match, or the arguments are on different devices.
    """
    _check("int8_matmul_mixed_dequantize", a, b, state_x, state_w, 1, bias, out_dtype)
    return int8_matmul_mixed_dequantize_op(a, b, state_x, state_w, bias, out_dtype)


def int8_matmul_rowwise_dequantize(
    a: Tensor,
    b: Tensor,
    state_x: Tensor,
    state_w: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Return the same as :func:`int8_matmul_mixed_dequantize`, with one absmax per column of b.

    arXiv 2304.13013, algorithm 3. It raises the same errors.

    Args:
        a: int8 values [M, K].
        b: int8 values [K, N].
        state_x: float32 [M].
        state_w: float32 [N], the absmax of each column of b (each row of the weight).
        bias: [N], float16, bfloat16 or float32, or None.
        out_dtype: float16, bfloat16 or float32.

    Returns:
        [M, N] in out_dtype.
    """
    _check("int8_matmul_rowwise_dequantize", a, b, state_x, state_w, b.shape[-1], bias, out_dtype)
    return int8_matmul_rowwise_dequantize_op(a, b, state_x, state_w, bias, out_dtype)


def _check(
    op: str,
    a: Tensor,
    b: Tensor,
    state_x: Tensor,
    state_w: Tensor,
    scales_of_b: int,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    for name, qdata in (("a", a), ("b", b)):
        check_dtype(op, name, qdata, torch.int8)
        check_2d(op, name, qdata)
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"{op}: b must have {a.shape[1]} rows, as many as a has columns, got {tuple(b.shape)}")
    for name, absmax, scales in (("state_x", state_x, a.shape[0]), ("state_w", state_w, scales_of_b)):
        check_dtype(op, name, absmax, torch.float32)
        check_shape(op, name, absmax, scales)
    if bias is not None:
        check_float(op, "bias", bias)
        check_shape(op, "bias", bias, b.shape[1])
    check_out_dtype(op, out_dtype)
    check_same_device(op, a, b=b, state_x=state_x, state_w=state_w, bias=bias)


def _int8_matmul_reference(
    a: Tensor, b: Tensor, state_x: Tensor, state_w: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    total = _exact_matmul(a, b)
    scale_x, scale_w = (state_x * ONE_OVER_127)[:, None], state_w * ONE_OVER_127
    # float32 results take the place of the sums: a new buffer of that size costs more than the arithmetic.
    in_place = out_dtype == torch.float32 and total.dtype == torch.int32
    out = total.view(torch.float32) if in_place else a.new_empty(total.shape, dtype=out_dtype)
    for block in row_blocks(total):
        scaled = total[block].to(torch.float32).mul_(scale_x[block] * scale_w)
        out[block] = scaled if bias is None else scaled.add_(bias.float())
    return out


def _exact_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b of int8 matrices, exact: int32, or int64 where int32 could overflow."""
    inner = a.shape[1]
    if inner > MAX_INT32_INNER:
        half = inner // 2
        return _exact_matmul(a[:, :half], b[:half]).long() + _exact_matmul(a[:, half:], b[half:]).long()
    # torch._int_mm (2.13) leaves the output unwritten at inner dimension 1. It misreads an expanded operand, and a
    # single row with another stride than a row's, which .contiguous() leaves as it is.
    if inner > 1 and not a.is_cuda and _int_mm_is_exact():
        if a.stride() != (inner, 1):
            a = a.clone(memory_format=torch.contiguous_format)
        is_transposed = b.stride(0) == 1 and b.stride(1) >= inner
        return torch._int_mm(a, b if is_transposed else b.contiguous())
    return _exact_matmul_in_float(a, b)


def cpu_path(inner: int) -> tuple[str, str]:
    """Return how a matmul over an inner dimension runs on this CPU, and why not faster; "" if that is fast."""
    if inner > 1 and _int_mm_is_exact():
        return "torch._int_mm", ""
    reason = "is not exact on this CPU" if inner > 1 else "is wrong at inner dimension 1"
    return "float32 matmuls", f"torch._int_mm {reason}"


def _exact_matmul_in_float(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b by float32 matmuls over chunks of 1024: |sums| <= 1024 * 128² = 2**24, where float32 is exact."""
    total = a.new_zeros((a.shape[0], b.shape[1]), dtype=torch.int32)
    with torch.autocast(a.device.type, enabled=False):  # it would round the sums to 16 bit
        for start in range(0, a.shape[1], 1024):
            chunk = slice(start, start + 1024)
            total += (a[:, chunk].float() @ b[chunk].float()).to(torch.int32)
    return total


@functools.cache
def _int_mm_is_exact() -> bool:
    """Return whether this CPU's torch._int_mm can be trusted: without VNNI instructions it saturates or worse."""
    with _disable_current_modes(), torch.device("cpu"):  # a model may be built on meta, or of FakeTensors
        generator = torch.Generator().manual_seed(0)
        a = torch.randint(-127, 128, (32, 192), generator=generator, dtype=torch.int8)
        b = torch.randint(-127, 128, (48, 192), generator=generator, dtype=torch.int8).t()
        a[0], b[:, 0] = 127, 127
        a[1], b[:, 1] = -127, 127
        return torch.equal(torch._int_mm(a, b), _exact_matmul_in_float(a, b))


int8_matmul_mixed_dequantize_op, int8_matmul_rowwise_dequantize_op = (
    define(
        f"{name}(Tensor a, Tensor b, Tensor state_x, Tensor state_w, Tensor? bias, ScalarType out_dtype) -> Tensor",
        fake=lambda a, b, state_x, state_w, bias, out_dtype: empty(a, (a.shape[0], b.shape[1]), out_dtype),
        reference=_int8_matmul_reference,
        kernels="int8_matmul",
    )
    for name in ("int8_matmul_mixed_dequantize", "int8_matmul_rowwise_dequantize")
)
