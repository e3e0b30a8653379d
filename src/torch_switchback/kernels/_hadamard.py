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
    row = tl.arange(0, SIZE)[:, None]
    place = tl.arange(0, SIZE)[None, :]
    col = (place // 2 % 4) * (SIZE // 4) + place // 8 * 2 + place % 2
    within = row & (BLOCK - 1)
    bits = (within & col) ^ (within & (within >> 1) & 0x55)
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1  # whose last bit is the parity of the bits that row and col share, and of row's pairs of bits
    sign = 1 - 2 * (bits & 1)
    return tl.where(row // BLOCK == col // BLOCK, sign, 0).to(tl.float32).to(part)


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
