"""Interpreted kernels between guard bands."""

import pytest
import torch
from test_kernels import CONFIGS

import guard_bands

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")


@pytest.mark.parametrize("name", guard_bands.QUANTIZERS)
@pytest.mark.parametrize("shape", guard_bands.SHAPES[2:4], ids=str)
def test_quantizers_between_bands(shape, name):
    guard_bands.check_quantizer(name, shape, torch.bfloat16, guard_bands.Band("cpu", 1))


@pytest.mark.parametrize("shape", guard_bands.SHAPES[2:4], ids=str)
def test_given_absmax_between_bands(shape):
    guard_bands.check_by_absmax(shape, torch.float32, guard_bands.Band("cpu", 1))
    guard_bands.check_dequantizer(shape, torch.float16, guard_bands.Band("cpu", 1))
    guard_bands.check_prepared_weight(shape, torch.float16, guard_bands.Band("cpu", 1))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", guard_bands.MATMULS[1:3], ids=str)
def test_matmuls_between_bands(shape, config, shift):
    guard_bands.check_matmul(config, shape, torch.float32, guard_bands.Band("cpu", shift))


def test_a_read_or_a_write_beyond_is_seen():
    band = guard_bands.Band("cpu", 0)

    def writes_beyond(x, out):
        out.copy_(x)
        out.as_strided((4,), (1,))[3] = 0

    x = torch.ones(3)
    with pytest.raises(AssertionError):
        guard_bands.check(lambda x, out: out.fill_(x.as_strided((4,), (1,)).sum()), (x,), torch.full((3,), 3.0), band)
    with pytest.raises(AssertionError):
        guard_bands.check(writes_beyond, (x,), x, band)
