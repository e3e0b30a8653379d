"""The arithmetic that the kernels share, bit for bit that of ops/_numerics.py.

It holds only if a product and a sum are not contracted to one fma: every kernel is compiled with
``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

SMALLEST_ABSMAX = tl.constexpr(2.0**-121)
ONE_OVER_127 = tl.constexpr(1.0 / 127.0)
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: for |v| < 2**22 the low bits of v + it are v rounded half to even


@triton.jit
def magnitude_bits(x):
    """Return the float32 bits of |x|. As integers they order like |x|, with NaN on top, which a float max may drop."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def bits_to_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def inverse_scale(absmax):
    """Return 127 / absmax in one IEEE division, or 0 where the int8 values are 0: absmax tiny, Inf or NaN."""
    usable = (absmax >= SMALLEST_ABSMAX) & (absmax < float("inf"))
    return tl.where(usable, tl.div_rn(127.0, tl.where(usable, absmax, 1.0)), 0.0)


@triton.jit
def quantize(x, inverse):
    """Return the int8 values rint(x * inverse), half to even; 0 where inverse is 0, whatever x is."""
    scaled = tl.where(inverse > 0.0, x.to(tl.float32), 0.0) * inverse
    return (scaled + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8)
