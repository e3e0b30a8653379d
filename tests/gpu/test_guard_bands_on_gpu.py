"""Compiled kernels between guard bands, matmuls by the tuned tiles and by one of each kernel in the table."""

import torch

import guard_bands
from testing import DTYPES, pairwise
from torch_switchback.kernels.device import architecture
from torch_switchback.tuning import matmul_table

SHAPES = [*guard_bands.SHAPES, (257, 513)]
SHIFTS = [0, 1, 7]
CONFIGS = {config.kernel: config for _, config in matmul_table(architecture(torch.device("cuda", 0)))}


@pairwise(dtype=DTYPES, shift=SHIFTS, name=guard_bands.QUANTIZERS, shape=[*SHAPES, (1, 70_001)])
def test_quantizers_between_bands(shape, name, dtype, shift):
    guard_bands.check_quantizer(name, shape, dtype, guard_bands.Band("cuda", shift))


@pairwise(dtype=DTYPES, shift=SHIFTS, shape=SHAPES)
def test_given_absmax_between_bands(shape, dtype, shift):
    guard_bands.check_by_absmax(shape, dtype, guard_bands.Band("cuda", shift))
    guard_bands.check_dequantizer(shape, dtype, guard_bands.Band("cuda", shift))
    guard_bands.check_prepared_weight(shape, dtype, guard_bands.Band("cuda", shift))


@pairwise(
    dtype=DTYPES,
    shift=SHIFTS,
    kernel=["tuned", *CONFIGS],
    shape=[*guard_bands.MATMULS, (129, 264, 528), (300, 1000, 144)],
)
def test_matmuls_between_bands(shape, kernel, dtype, shift):
    guard_bands.check_matmul(CONFIGS.get(kernel), shape, dtype, guard_bands.Band("cuda", shift))
