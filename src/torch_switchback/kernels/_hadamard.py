"""The block Hadamard rotation, bit for bit that of ops/_hadamard.py."""

import triton
import triton.language as tl


@triton.jit
def load_parts(part, step, inside, PARTS: tl.constexpr):
    """PARTS tensors as a tuple in float32: one from the pointers ``part``, each next one ``step`` elements further on.

    inside: [n], of how many of its PARTS values each pointer may load; the others are zeros.
    """
    if tl.min(inside, axis=0) >= PARTS:  # no masks: they would be an instruction an element
        parts = load_all(part, step, PARTS)
    else:
        parts = load_some(part, step, inside, PARTS)
    return parts


@triton.jit
def load_all(part, step, PARTS: tl.constexpr):
    parts = ()
    for _ in tl.static_range(PARTS):
        parts += (tl.load(part).to(tl.float32),)
        part += step
    return parts


@triton.jit
def load_some(part, step, inside, PARTS: tl.constexpr):
    parts = ()
    for i in tl.static_range(PARTS):
        parts += (tl.load(part, mask=inside > i, other=0.0).to(tl.float32),)
        part += step
    return parts


@triton.jit
def hadamard(parts, BLOCK: tl.constexpr):
    """Rotate a tuple of tensors, each BLOCK of them by themselves, without the factor BLOCK ** -0.5.

    What is summed lies in one thread's registers: the rotated axis is the tuple's.
    """
    for i in tl.static_range(1, BLOCK.bit_length()):
        parts = butterfly(parts, 1 << (i - 1))
    return parts


@triton.jit
def butterfly(parts, SPAN: tl.constexpr):
    sums = ()
    for i in tl.static_range(len(parts)):
        if i & SPAN:
            sums += (parts[i ^ SPAN] - parts[i],)
        else:
            sums += (parts[i] + parts[i ^ SPAN],)
    return sums


@triton.jit
def stack(parts):
    """The tensors of a tuple, a power of two, beside each other: [n] each -> [n, number of parts]."""
    length: tl.constexpr = parts[0].shape[0]
    count: tl.constexpr = len(parts)
    for _ in tl.static_range(1, count.bit_length()):
        parts = join_halves(parts)
    return parts[0].reshape((length, count))


@triton.jit
def join_halves(parts):
    """Half as many tensors, each of a part and the one half of the tuple further on, along a new last axis."""
    half: tl.constexpr = len(parts) // 2
    pairs = ()
    for i in tl.static_range(half):
        pairs += (tl.join(parts[i], parts[i + half]),)
    return pairs
