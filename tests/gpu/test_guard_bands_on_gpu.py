"""Compiled kernels between guard bands, products by the tuned tiles and by one of each kernel in the table."""

import pytest
import torch

import guard_bands
from testing import DTYPES
from torch_switchback.kernels.device import architecture
from torch_switchback.tuning import matmul_table

shifts = pytest.mark.parametrize("shift", [0, 1, 7])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
CONFIGS = {config.kernel: config for _, config in matmul_table(architecture(torch.device("cuda", 0)))}


@shifts
@dtypes
@pytest.mark.parametrize("name", guard_bands.QUANTIZERS)
@pytest.mark.parametrize("shape", [*guard_bands.SHAPES, (257, 513), (1, 70_001)], ids=str)
def test_quantizers_between_bands(shape, name, dtype, shift):
    guard_bands.check_quantizer(name, shape, dtype, guard_bands.Band("cuda", shift))


@shifts
@dtypes
@pytest.mark.parametrize("shape", [*guard_bands.SHAPES, (257, 513)], ids=str)
def test_given_absmax_between_bands(shape, dtype, shift):
    guard_bands.check_by_absmax(shape, dtype, guard_bands.Band("cuda", shift))
    guard_bands.check_dequantizer(shape, dtype, guard_bands.Band("cuda", shift))


@shifts
@dtypes
@pytest.mark.parametrize("config", [None, *CONFIGS.values()], ids=["tuned", *CONFIGS])
@pytest.mark.parametrize("shape", [*guard_bands.PRODUCTS, (129, 264, 528), (300, 1000, 144)], ids=str)
def test_products_between_bands(shape, config, dtype, shift):
    guard_bands.check_product(config, shape, dtype, guard_bands.Band("cuda", shift))
