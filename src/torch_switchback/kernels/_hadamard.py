"""The block Hadamard rotation of ops/_hadamard.py, on tensor cores.

Products with ±1 are exact and sums are accumulated in float32, but in the hardware's order and width: where a sum is
not exact it may differ from the CPU's in its last bits.
"""

import triton
import triton.language as tl


@triton.jit
def hadamard_matrix(dtype: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Return [SIZE, SIZE]: signs times Sylvester's ±1 matrices of BLOCK on the diagonal, columns as unshuffle wants.

    dtype: of what it is to rotate; float32 is rotated in parts of bfloat16.
    """
    part: tl.constexpr = tl.bfloat16 if dtype == tl.float32 else dtype
    place = tl.arange(0, SIZE)[None, :]
    col = (place // 2 % 4) * (SIZE // 4) + place // 8 * 2 + place % 2
    return signed_hadamard(tl.arange(0, SIZE)[:, None], col, BLOCK).to(part)


@triton.jit
def signed_hadamard(place, sum, BLOCK: tl.constexpr):
    """Return with what the value at a place goes into a sum of its block: the place's sign times ±1; else 0."""
    within = place & (BLOCK - 1)
    bits = (within & sum) ^ (within & (within >> 1) & 0x55)
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1  # whose last bit is the parity of the bits that both share, and of the place's pairs of bits
    sign = 1 - 2 * (bits & 1)
    return tl.where(place // BLOCK == sum // BLOCK, sign, 0).to(tl.float32)


@triton.jit
def rotate_int8_back(qdata, BLOCK: tl.constexpr):
    """Return float32 [rows, cols]: int8 values [rows, cols] that were rotated along the columns, rotated back."""
    cols: tl.constexpr = qdata.shape[1]
    sum = tl.arange(0, cols)[:, None]
    matrix = signed_hadamard(tl.arange(0, cols)[None, :], sum, BLOCK).to(tl.bfloat16)
    exact = qdata.to(tl.float32).to(tl.bfloat16)  # by float32, as the interpreter gets int8 to bfloat16 wrong
    return tl.dot(exact, matrix) * BLOCK**-0.5  # sums of integers below 2**24: exact, too


@triton.jit
def rotate_transposed(x, matrix):
    """Return float32 [n, SIZE]: x [SIZE, n] rotated along its rows by the matrix, without the factor BLOCK ** -0.5.

    The columns are in the order of tensor cores' results: see unshuffle.
    """
    if x.dtype == tl.float32:
        rotated = tl.zeros([x.shape[1], x.shape[0]], dtype=tl.float32)
        x *= 0.5  # bfloat16 would round float32's largest to infinity
        for _ in tl.static_range(3):  # three times 8 bits: exactly x
            part = x.to(tl.bfloat16)
            rotated = tl.dot(tl.trans(part), matrix, rotated)
            x -= part.to(tl.float32)
        rotated *= 2.0
    else:
        rotated = tl.dot(tl.trans(x), matrix)
    return rotated


@triton.jit
def unshuffle(x):
    """Return x [n, SIZE] of rotate_transposed with its columns in their own order.

    Of eight columns of a result each of four threads holds two. Here its SIZE // 4 are neighbors, so that it stores
    whole words of int8 values and none changes its thread.
    """
    n: tl.constexpr = x.shape[0]
    size: tl.constexpr = x.shape[1]
    return x.reshape((n, size // 8, 4, 2)).permute((0, 2, 1, 3)).reshape((n, size))
