"""Interpreted kernels, launched again for other arguments of a kind."""

import pytest
import torch

from cases import assert_same, codes
from torch_switchback.kernels import _absmax, _replay, int8_matmul, quantize_global, quantize_rotated, quantize_rowwise

SHAPE = 17, 83


def empty(*shape, dtype=torch.int8):
    return torch.full(shape, 99, dtype=dtype)


def absmax(*shape):
    return empty(*shape, dtype=torch.float32)


def product_arguments():
    a, b = codes(45, 17).t(), codes(32, 45)  # both of which are copied
    return a, b.t(), torch.rand(17), torch.rand(32), torch.randn(32), torch.float16


CASES = {
    "quantize_rowwise": (quantize_rowwise, lambda: (torch.randn(SHAPE),), lambda: (empty(*SHAPE), absmax(17))),
    "quantize_global": (quantize_global, lambda: (torch.randn(SHAPE),), lambda: (empty(*SHAPE), absmax(1))),
    "quantize_rowwise_and_rotated_columnwise": (
        quantize_rotated,
        lambda: (torch.randn(SHAPE), 16),
        lambda: (empty(*SHAPE), absmax(17), empty(83, 32), absmax(83)),
    ),
    "int8_matmul_rowwise_dequantize": (int8_matmul, product_arguments, lambda: (empty(17, 32, dtype=torch.float16),)),
}


@pytest.mark.parametrize("name", CASES)
def test_launches_are_made_again(name, monkeypatch):
    monkeypatch.setattr(_absmax, "MAX_SMALL", 0)  # so that one launch leaves something to the next
    monkeypatch.setattr(_replay, "_replays", {})
    module, new_arguments, new_outputs = CASES[name]
    launcher = getattr(module, name)
    calls = []

    def counted(*args):
        calls.append(args)
        outputs = new_outputs()
        _replay.note_memory(*outputs)
        launcher(*args, *outputs)
        return outputs

    for _ in range(3):
        args, expected = new_arguments(), new_outputs()
        outputs = _replay.run(counted, args, _replay.kind_of(args))
        launcher(*args, *expected)
        for actual, wanted in zip(outputs, expected, strict=True):
            assert_same(actual, wanted)
    assert len(calls) == 1
