"""The block Hadamard rotation: what is summed, and in which order."""

import torch


def rotate(x: torch.Tensor, block: int, dim: int = 0) -> torch.Tensor:
    """x, float32, times the orthogonal block Hadamard matrix along dim (not negative), a multiple of block long.

    Each block is multiplied by H / sqrt(block), where H is the ±1 matrix of Sylvester's order: log2(block) steps of
    sums and differences, of neighbours first, each rounded once, then one product with float32(block ** -0.5).
    """
    length, span = x.shape[dim], 1
    while span < block:
        first, second = x.unflatten(dim, (length // (2 * span), 2, span)).unbind(dim + 1)
        x = torch.stack((first + second, first - second), dim + 1).flatten(dim, dim + 2)
        span *= 2
    return x * block**-0.5
