"""The kernels of a prepared layer's backward, interpreted, against their operations in plain torch."""

import pytest
import torch
from test_kernels import poisoned, truncate_to_bfloat16

from testing import (
    DTYPES,
    LAYOUTS,
    assert_same,
    assert_same_within_one_step,
    pairwise,
    planned,
    random_int8,
    signal_to_noise,
)
from torch_switchback.kernels import (
    int8_linear,
    quantize_folded_rowwise,
    quantize_rotated,
    quantize_rowwise,
    transpose_int8,
)
from torch_switchback.kernels.launch import specialization_key
from torch_switchback.ops.prepared_weight import dequantize_rotated

OPS = torch.ops.torch_switchback
SHAPES = [(1, 1), (3, 5), (17, 83), (130, 67), (0, 4), (4, 0)]

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")


@pytest.mark.parametrize("shape", [*SHAPES, (256, 128), (300, 1000)], ids=str)
def test_transpose_int8(shape):
    x = random_int8(*shape)
    for each in (x, x.t().contiguous().t(), torch.cat((x, x), 1)[:, ::2]):
        out = poisoned(*shape[::-1])
        planned(transpose_int8.plan_transpose_int8)(each, out)
        assert_same(out, each.t().contiguous())


def test_a_plan_serves_all_that_share_its_key():
    """Rows share a key up to the next power of two if 16 divides their number; weights share it if they are alike."""
    small, large, scale = random_int8(96, 48), random_int8(128, 48), torch.rand(48)
    assert specialization_key((small,)) == specialization_key((large,))
    calls = {
        transpose_int8.plan_transpose_int8: ((small,), (large,)),
        quantize_folded_rowwise.plan_quantize_folded_rowwise: ((small.float(), scale), (large.float(), scale)),
        quantize_rotated.plan_requantize_rotated: ((small, torch.rand(96), 16), (large, torch.rand(128), 16)),
        int8_linear.plan_prepared_grad_input: [
            (each.float(), random_int8(48, 32), scale, None, True, torch.float32) for each in (small, large)
        ],
    }
    for make, (first, *others) in calls.items():
        operation = getattr(OPS, make.__name__.removeprefix("plan_"))
        outputs = operation(*first)
        plan = make(*first, *(outputs if isinstance(outputs, tuple) else (outputs,)))
        for args in (*others, first):
            expected = operation(*args)
            expected = expected if isinstance(expected, tuple) else (expected,)
            out = [poisoned(*tensor.shape, dtype=tensor.dtype) for tensor in expected]
            plan(*args, *out)
            if make is quantize_rotated.plan_requantize_rotated:
                assert out[0].shape == expected[0].shape
                assert signal_to_noise(out[0].float(), expected[0].float()) > 30  # the interpreter truncates bfloat16
            else:
                for actual, wanted in zip(out, expected, strict=True):
                    assert_same(actual, wanted)


def check_folded(x, scale):
    expected = OPS.quantize_folded_rowwise(x, scale)
    out = [poisoned(*tensor.shape, dtype=tensor.dtype) for tensor in expected]
    planned(quantize_folded_rowwise.plan_quantize_folded_rowwise)(x, scale, *out)
    for actual, wanted in zip(out, expected, strict=True):
        assert_same(actual, wanted)


@pairwise(dtype=DTYPES, layout=LAYOUTS, shape=SHAPES)
def test_quantize_folded_rowwise(dtype, layout, shape):
    scale = torch.rand(2 * shape[1])[::2]
    check_folded(layout(*shape, dtype), scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_scales_that_are_not_finite(value):
    scale = torch.rand(83)
    scale[5] = value
    x = torch.randn(7, 83)
    x[2, 5] = 0.0
    check_folded(x, scale)
    assert OPS.quantize_folded_rowwise(x, scale)[1].isfinite().all() == (value == 0.0)


@pytest.mark.parametrize("most", [1024, 128])
def test_rows_in_chunks_and_read_twice(most, monkeypatch):
    monkeypatch.setattr(quantize_rowwise, "MAX_BLOCK_COLS", most)
    quantize_rowwise.row_tile.cache_clear()
    check_folded(torch.randn(5, 700), torch.rand(700))
    quantize_rowwise.row_tile.cache_clear()


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("rowwise", [False, True], ids=["global", "rowwise"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prepared_grad_input(shape, rowwise, is_transposed):
    (tokens, out_features), in_features = shape, 48
    grad, weight_int8 = torch.randn(tokens, out_features), random_int8(out_features, in_features)
    transposed = weight_int8.t().contiguous() if is_transposed else None
    args = grad, weight_int8, torch.rand(out_features if rowwise else 1), transposed, rowwise, torch.float32
    out = poisoned(tokens, in_features, dtype=torch.float32)
    planned(int8_linear.plan_prepared_grad_input)(*args, out)
    assert_same(out, OPS.prepared_grad_input(*args[:3], None, *args[4:]))


@pytest.mark.parametrize("rows", [1, 9])
def test_several_blocks_of_rows_in_a_program(rows, monkeypatch):
    monkeypatch.setattr(quantize_folded_rowwise, "FEW_ROWS", 0)
    check_folded(torch.randn(rows, 1200), torch.rand(1200))


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("shape", [(1, 128), (70, 128), (130, 384)], ids=str)
def test_requantize_rotated(shape, block):
    x, absmax = random_int8(*shape), torch.rand(shape[0])
    weight = truncate_to_bfloat16(dequantize_rotated(x, absmax, block))
    expected = OPS.quantize_rotated_columnwise_and_transpose(weight, block)
    for each in (x, x.t().contiguous().t()):
        out = [poisoned(*tensor.shape, dtype=tensor.dtype) for tensor in expected]
        planned(quantize_rotated.plan_requantize_rotated)(each, absmax, block, *out)
        assert_same_within_one_step(out, expected)
