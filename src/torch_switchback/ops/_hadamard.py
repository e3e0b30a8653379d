"""The block Hadamard rotation: what is summed, and in which order."""

import torch
from torch import Tensor


def rotate(x: Tensor, block: int, dim: int = 0) -> Tensor:
    """Multiply x, float32, by an orthogonal matrix of block × block along dim (not negative), a multiple of block long.

    Each block is multiplied by its signs and then by H / sqrt(block), where H is the ±1 matrix of Sylvester's order:
    log2(block) steps of sums and differences, of neighbors first, each rounded once, then one product with
    float32(block ** -0.5).
    """
    return _sums(_with_signs(x, block, dim), block, dim) * block**-0.5


def _with_signs(x: Tensor, block: int, dim: int) -> Tensor:
    along = signs(block, x).view(block, *(1 for _ in x.shape[dim + 1 :]))
    return (x.unflatten(dim, (x.shape[dim] // block, block)) * along).flatten(dim, dim + 1)


def _sums(x: Tensor, block: int, dim: int) -> Tensor:
    """Multiply x along dim by H, block by block."""
    length, span = x.shape[dim], 1
    while span < block:
        first, second = x.unflatten(dim, (length // (2 * span), 2, span)).unbind(dim + 1)
        x = torch.stack((first + second, first - second), dim + 1).flatten(dim, dim + 2)
        span *= 2
    return x


def signs(block: int, like: Tensor) -> Tensor:
    """Return ±1 [block], as like is: -1 where an odd number of the pairs of bits 0 1, 2 3, 4 5 is set.

    H would gather what the values of a block have in common, as those after ReLU or GELU do, in its first sum. Bent
    functions, as this one is for 16 and 64, correlate equally little with every row of H: it is spread over all sums.
    """
    place = torch.arange(block, device=like.device)
    pairs = place & (place >> 1)
    odd = (pairs ^ (pairs >> 2) ^ (pairs >> 4)) & 1
    return (1 - 2 * odd).to(like.dtype)


def rotate_features(x: Tensor, block: int) -> Tensor:
    """Return x [rows, cols] rotated along its columns, zeros filling the last block, in float32."""
    return rotate(torch.nn.functional.pad(x.float(), (0, -x.shape[1] % block)), block, dim=1)


def rotate_features_back(x: Tensor, block: int) -> Tensor:
    """Return x [rows, cols], float32, cols a multiple of block, as it was before :func:`rotate_features`."""
    return _with_signs(_sums(x, block, 1) * block**-0.5, block, 1)
