"""Check what holds for every input, on those that hypothesis draws: 200 for each property, or ``make fuzz``."""

import os
from functools import partial

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torch_switchback as ts
from testing import DTYPES, assert_same
from torch_switchback import SwitchBackConfig
from torch_switchback.config import ROTATIONS
from torch_switchback.ops._hadamard import rotate

settings.register_profile("fixed", derandomize=True, max_examples=200, deadline=None)
settings.register_profile(
    "fuzz", max_examples=5000, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

sizes = st.integers(1, 40)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31 - 1)
configs = st.builds(SwitchBackConfig, st.sampled_from(["global", "rowwise"]), st.booleans())


@st.composite
def matrices(draw, max_exponent=12):
    """[rows, cols] of one dtype with rows of very different size, some of them zero, some with outliers."""
    rows, cols, dtype = draw(sizes), draw(sizes), draw(dtypes)
    generator = torch.Generator().manual_seed(draw(seeds))
    x = torch.randn(rows, cols, generator=generator)
    spread = draw(st.floats(0, max_exponent / 3))
    x *= torch.randn(rows, 1, generator=generator).mul(spread).clamp(-max_exponent, max_exponent).exp2()
    if draw(st.booleans()):
        x[draw(st.integers(0, rows - 1))] = 0
    if draw(st.booleans()):
        x[:, draw(st.integers(0, cols - 1))] *= 50
    return x.clamp(-65_504, 65_504).to(dtype)  # finite in float16 too


def layer_for(x, out_features, seed, config):
    torch.manual_seed(seed)
    layer = torch.nn.Linear(x.shape[1], out_features)
    return ts.convert_to_switchback(layer, config=config)


@given(matrices())
def test_int8_values_are_within_half_a_step(x):
    for qdata, absmax in (
        (ts.ops.quantize_rowwise(x)[0], ts.ops.quantize_rowwise(x)[1][:, None]),
        ts.ops.quantize_global(x),
        (ts.ops.quantize_columnwise_and_transpose(x)[0].t(), ts.ops.quantize_columnwise_and_transpose(x)[1]),
    ):
        assert qdata.abs().max() <= 127
        step = absmax.double() / 127
        assert ((qdata.double() * step - x.double()).abs() <= step / 2 * (1 + 1e-6)).all()


@given(matrices(), st.sampled_from(ROTATIONS))
def test_rotated_int8_values_are_within_half_a_step(x, block):
    qdata, absmax = ts.ops.quantize_columnwise_and_transpose(x, rotate_tokens=block)
    exact = rotate(torch.nn.functional.pad(x.double(), (0, 0, 0, -x.shape[0] % block)), block)
    step = absmax.double() / 127
    sums = 8 * torch.finfo(torch.float32).eps * x.double().abs().sum(0)
    assert qdata.abs().max() <= 127
    assert ((qdata.t().double() * step - exact).abs() <= step / 2 * (1 + 1e-6) + sums).all()


@given(matrices(), sizes, seeds, st.sampled_from(ROTATIONS), seeds)
def test_the_int8_weight_gradient_is_within_the_sum_of_all_roundings(x, out_features, grad_seed, block, seed):
    grad = torch.randn(x.shape[0], out_features, generator=torch.Generator().manual_seed(grad_seed))
    config = SwitchBackConfig(grad_weight="int8", rotate_tokens=block)
    layer = layer_for(x, out_features, seed, config)
    (actual,) = torch.autograd.grad(layer(x.float()), layer.weight, grad)
    rotated = []
    for operand in (x.double(), grad.double()):
        rotated.append(rotate(torch.nn.functional.pad(operand, (0, 0, 0, -x.shape[0] % block)), block).abs())
    step_x, step_grad = (operand.amax(0) / 127 for operand in rotated)
    bound = (
        rotated[1].sum(0)[:, None] * step_x / 2
        + step_grad[:, None] / 2 * rotated[0].sum(0)
        + rotated[0].shape[0] / 4 * step_grad[:, None] * step_x
    )
    assert ((actual.double() - grad.double().t() @ x.double()).abs() <= bound * (1 + 1e-4)).all()


@given(matrices(), sizes, seeds, configs)
def test_output_is_within_the_sum_of_all_roundings(x, out_features, seed, config):
    layer = layer_for(x, out_features, seed, config)
    y = layer(x)
    weight = layer.weight.detach().double()
    exact = x.double() @ weight.t() + layer.bias.double()
    step_x = ts.ops.quantize_rowwise(x)[1].double()[:, None] / 127
    absmax = ts.ops.quantize_global(weight.float())[1] if config.weight_scaling == "global" else weight.abs().amax(1)
    step_w = absmax.double() / 127
    bound = (
        step_w / 2 * x.double().abs().sum(1, keepdim=True)
        + step_x / 2 * weight.abs().sum(1)
        + x.shape[1] / 4 * step_x * step_w
    )
    finite = y.isfinite()  # fp16 overflows to Inf as nn.Linear does
    assert (finite | (exact.abs() + bound > 65_000)).all()
    rounding = torch.finfo(y.dtype).eps * exact.abs() + torch.finfo(y.dtype).tiny
    error = (y.double() - exact).abs()
    assert (error <= bound * (1 + 1e-5) + rounding + 1e-6 * exact.abs())[finite].all()


@given(matrices(max_exponent=3), st.integers(-100, 100))
def test_a_power_of_two_leaves_the_int8_values(x, exponent):
    x = x.float()
    qdata, absmax = ts.ops.quantize_rowwise(x)
    scaled_qdata, scaled_absmax = ts.ops.quantize_rowwise(x * 2.0**exponent)
    assert_same(scaled_qdata, qdata)
    assert_same(scaled_absmax, absmax * 2.0**exponent)


@given(matrices(), sizes, seeds, configs, st.data())
def test_rows_do_not_know_their_neighbors(x, out_features, seed, config, data):
    layer = layer_for(x, out_features, seed, config)
    y = layer(x)
    order = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed))
    assert_same(layer(x[order]), y[order])
    cut = data.draw(st.integers(0, x.shape[0]))
    assert_same(torch.cat([layer(x[:cut]), layer(x[cut:])]), y)


@given(matrices())
def test_fused_transposes_equal_quantizing_then_transposing(x):
    qdata, absmax = ts.ops.quantize_global(x)
    qdata_t, absmax_t = ts.ops.quantize_global_transpose(x)
    assert_same(qdata_t, qdata.t().contiguous())
    assert_same(absmax_t, absmax)
    for actual, expected in zip(ts.ops.quantize_global_with_transpose(x), (qdata, qdata_t, absmax), strict=True):
        assert_same(actual, expected)
    qdata, absmax = ts.ops.quantize_rowwise(x.t())
    qdata_t, absmax_t = ts.ops.quantize_columnwise_and_transpose(x)
    assert_same(qdata_t, qdata)
    assert_same(absmax_t, absmax)


@given(matrices(), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5), st.booleans())
def test_strides_do_not_matter(x, row_step, col_step, offset, transposed):
    rows, cols = x.shape
    if transposed:
        buffer = torch.full((cols * col_step + offset, rows * row_step), float("nan"), dtype=x.dtype)
        view = buffer[offset::col_step, ::row_step].t()
    else:
        buffer = torch.full((rows * row_step + offset, cols * col_step), float("nan"), dtype=x.dtype)
        view = buffer[offset::row_step, ::col_step]
    view = view[:rows, :cols]
    view.copy_(x)
    for quantize in (
        ts.ops.quantize_rowwise,
        ts.ops.quantize_global,
        ts.ops.quantize_global_transpose,
        ts.ops.quantize_global_with_transpose,
        ts.ops.quantize_columnwise_and_transpose,
        partial(ts.ops.quantize_columnwise_and_transpose, rotate_tokens=16),
    ):
        for actual, expected in zip(quantize(view), quantize(x), strict=True):
            assert_same(actual, expected)


@given(sizes, sizes, st.integers(0, 300), seeds, st.booleans())
def test_the_int8_product_is_the_int64_one(m, n, k, seed, extreme):
    generator = torch.Generator().manual_seed(seed)
    low = 127 if extreme else -127
    a = torch.randint(low, 128, (m, k), generator=generator, dtype=torch.int8)
    b = torch.randint(low, 128, (k, n), generator=generator, dtype=torch.int8)
    scale = torch.full((m,), 127.0)
    out = ts.ops.int8_matmul_mixed_dequantize(a, b, scale, scale[:1], None, torch.float32)
    one = torch.tensor(127.0) * torch.tensor(1.0 / 127.0)
    assert_same(out, (a.long() @ b.long()).float() * (one * one))


@given(matrices(), sizes, seeds, configs, st.lists(st.tuples(sizes, sizes, st.booleans()), max_size=4))
def test_the_rows_that_are_not_finite_are_the_references(x, out_features, seed, config, poison):
    layer = layer_for(x, out_features, seed, config)
    x = x.float()
    for row, col, is_nan in poison:
        x[row % x.shape[0], col % x.shape[1]] = float("nan") if is_nan else float("inf")
    assert torch.equal(layer(x).isfinite().all(1), x.isfinite().all(1))
    assert torch.equal(layer(x).isfinite().any(1), x.isfinite().all(1))
