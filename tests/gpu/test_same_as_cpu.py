"""The same bits on the GPU as on the CPU: int8 values, matmuls, and a layer's output and input gradient.

All but the rotated int8 values, whose sums are in the hardware's order.
"""

import dataclasses

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import torch_switchback as ts
from testing import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    STRATEGIES,
    assert_same,
    assert_same_int8_grad_weight,
    assert_same_within_one_step,
    gradients,
    make_layer,
    pairwise,
    planned,
    random_int8,
    signal_to_noise,
)
from torch_switchback import ops
from torch_switchback.kernels import int8_matmul, launch
from torch_switchback.tuning import MatmulConfig, matmul_table

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
strategies = pytest.mark.parametrize("config", STRATEGIES.values(), ids=STRATEGIES)

QUANTIZERS = [
    ts.ops.quantize_rowwise,
    ts.ops.quantize_columnwise_and_transpose,
    ts.ops.quantize_global,
    ts.ops.quantize_global_transpose,
    ts.ops.quantize_global_with_transpose,
]


@pairwise(dtype=DTYPES, layout=LAYOUTS, shape=[*SHAPES, (2048, 1536), (70_000, 24), (513, 1280), (33, 14_336)])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda f: f.__name__)
def test_quantizers(quantizer, dtype, layout, shape):
    x = layout(*shape, dtype)
    for actual, expected in zip(quantizer(on_gpu(x)), quantizer(x), strict=True):
        assert_same(actual, expected)


def on_gpu(x):
    """x with its strides, of which those of an expanded tensor are 0."""
    gpu = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    one = (slice(1), slice(1)) if 0 in x.stride() else ...
    gpu[one].copy_(x[one])
    return gpu


@pairwise(dtype=DTYPES, layout=LAYOUTS, shape=[*SHAPES, (2048, 1536), (70_000, 24), (33, 14_336)])
def test_rotating_quantizers(dtype, layout, shape, block=64):
    x = layout(*shape, dtype)
    gpu, expected = on_gpu(x), ops.quantize_rowwise_and_rotated_columnwise(x, block)
    actual = ops.quantize_rowwise_and_rotated_columnwise(gpu, block)
    for rows, wanted in zip(actual[:2], expected[:2], strict=True):
        assert_same(rows, wanted)
    assert_same_within_one_step(actual[2:], expected[2:])
    again = ops.quantize_rowwise_and_rotated_columnwise(gpu, block)
    alone = ts.ops.quantize_columnwise_and_transpose(gpu, rotate_tokens=block)
    for other in (again[2:], alone):
        assert_same(other[0], actual[2])
        assert_same(other[1], actual[3])


@pytest.mark.parametrize("block", [16, 64, 128])
@pairwise(dtype=DTYPES, layout=LAYOUTS, shape=[*SHAPES, (70_000, 24), (513, 1280), (333, 5120), (33, 14_336)])
def test_rotating_row_wise_quantizer(dtype, layout, shape, block):
    x = layout(*shape, dtype)
    gpu = on_gpu(x)
    actual = ts.ops.quantize_rowwise(gpu, rotate_features=block)
    assert_same_within_one_step(actual, ts.ops.quantize_rowwise(x, rotate_features=block))
    order = torch.randperm(shape[0])
    again = ts.ops.quantize_rowwise(gpu, rotate_features=block)
    permuted = ts.ops.quantize_rowwise(gpu[order.cuda()], rotate_features=block)
    for one, same, other in zip(actual, again, permuted, strict=True):
        assert_same(same, one)
        assert_same(other, one[order.cuda()])


@dtypes
@pytest.mark.parametrize("shape", [(64, 96, 128), (333, 131, 257)], ids=str)
def test_layer_that_rotates_its_features(shape, dtype):
    """Run to run the same bits, and the CPU's up to the int8 values that are one apart."""
    tokens, in_features, out_features = shape
    layer = make_layer(ts.SwitchBackConfig("rowwise", rotate_features=64), in_features, out_features, dtype=dtype)
    x, grad = torch.randn(tokens, in_features).to(dtype), torch.randn(tokens, out_features).to(dtype)
    results = []
    for device in ("cpu", "cuda", "cuda"):
        layer.to(device)
        results.append(gradients(layer, x.to(device), grad.to(device))[:2])
    for on_cpu, on_gpu, again in zip(*results, strict=True):
        assert_same(on_gpu, again)
        assert signal_to_noise(on_gpu.cpu(), on_cpu) > 50


@dtypes
@pytest.mark.parametrize("block", [16, 64])  # whose square roots are powers of two
def test_rotated_int8_values_of_exact_sums(block, dtype):
    x = torch.randint(-128, 129, (1000, 300)).to(dtype)
    for actual, expected in zip(
        ts.ops.quantize_columnwise_and_transpose(x.cuda(), rotate_tokens=block),
        ts.ops.quantize_columnwise_and_transpose(x, rotate_tokens=block),
        strict=True,
    ):
        assert_same(actual, expected)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_requantized_int8_values(block):
    x, absmax = random_int8(1000, 384), torch.rand(1000)
    actual = torch.ops.torch_switchback.requantize_rotated(x.cuda(), absmax.cuda(), block)
    assert_same_within_one_step(actual, torch.ops.torch_switchback.requantize_rotated(x, absmax, block))


@dtypes
@pytest.mark.parametrize("shape", [(1000, 777), (5, 20_011), (3, 14_336)], ids=str)
def test_quantize_folded_rowwise(shape, dtype):
    x, scale = torch.randn(shape).to(dtype), torch.rand(shape[1])
    for actual, expected in zip(
        torch.ops.torch_switchback.quantize_folded_rowwise(x.cuda(), scale.cuda()),
        torch.ops.torch_switchback.quantize_folded_rowwise(x, scale),
        strict=True,
    ):
        assert_same(actual, expected)


@dtypes
def test_dequantize_rowwise(dtype):
    x, absmax = random_int8(1000, 777), torch.rand(1000)
    absmax[3] = float("nan")
    assert_same(ts.ops.dequantize_rowwise(x.cuda(), absmax.cuda(), dtype), ts.ops.dequantize_rowwise(x, absmax, dtype))


def matmul_of(m, n, k, scales, bias):
    bias = torch.randn(n) if bias else None
    return random_int8(m, k), random_int8(n, k).t(), torch.rand(m), torch.rand(scales), bias, torch.bfloat16


OPERATIONS = {
    "quantize_rowwise": lambda: (torch.randn(333, 1280),),
    "dequantize_rowwise": lambda: (random_int8(333, 1280), torch.rand(333), torch.bfloat16),
    "quantize_global": lambda: (torch.randn(333, 1280),),
    "quantize_global_transpose": lambda: (torch.randn(1280, 333).to(torch.bfloat16),),
    "quantize_global_with_transpose": lambda: (torch.randn(64, 64),),
    "quantize_transpose_by_absmax": lambda: (torch.rand(333, 128), torch.rand(1) + 1),
    "quantize_by_absmax": lambda: (torch.rand(333, 128), torch.rand(333) + 1),
    "quantize_columnwise_and_transpose": lambda: (torch.randn(333, 1280),),
    "transpose_int8": lambda: (random_int8(333, 1280),),
    "quantize_folded_rowwise": lambda: (torch.randn(333, 1280), torch.rand(1280)),
    "prepared_grad_input": lambda: (
        *(torch.randn(300, 200), random_int8(200, 83), torch.rand(200)),
        *(None, True, torch.float32),
    ),
    "int8_matmul_mixed_dequantize": lambda: matmul_of(640, 384, 1024, 1, True),
    "int8_matmul_rowwise_dequantize": lambda: matmul_of(300, 200, 83, 200, False),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_later_launches_get_their_own_arguments(name):
    """The first call compiles, the others launch what is cached."""
    operation, kept = getattr(torch.ops.torch_switchback, name), []
    for _ in range(3):
        args = OPERATIONS[name]()
        gpu_args = (on_gpu(arg) if isinstance(arg, torch.Tensor) else arg for arg in args)
        kept.append((operation(*args), operation(*gpu_args)))  # so that no result lies where an earlier one lay
    for results in kept:
        expected, actual = (each if isinstance(each, tuple) else (each,) for each in results)
        for one, wanted in zip(actual, expected, strict=True):
            assert_same(one, wanted)


def test_one_tensor_as_both_operands():
    a, b, absmax = random_int8(256, 512), random_int8(256, 512), torch.rand(256)
    on_gpu = {id(each): each.cuda() for each in (a, b)}
    for left, right in ((a, a), (a, b), (b, b), (b, a)):
        absmaxes = absmax, absmax.clone()
        actual = ts.ops.int8_matmul_rowwise_dequantize(
            on_gpu[id(left)], on_gpu[id(right)].t(), *(each.cuda() for each in absmaxes), None
        )
        assert_same(actual, ts.ops.int8_matmul_rowwise_dequantize(left, right.t(), *absmaxes, None))


CONFIGS = {
    "-".join(str(value) for value in dataclasses.astuple(config)): config
    for architecture in ("sm_80", "sm_90")
    for _, config in matmul_table(architecture)
}


@pairwise(
    dtype=DTYPES,
    rowwise=[False, True],
    shape=[(1, 16, 16), (640, 384, 1024), (300, 1000, 528), (129, 257, 1000), (1000, 1000, 83), (17, 83, 1)],
    config=CONFIGS,
)
def test_matmuls_of_every_configuration(dtype, rowwise, shape, config):
    m, n, k = shape
    a, b = random_int8(m, k), random_int8(n, k).t()
    absmax_a, absmax_b, bias = torch.rand(m), torch.rand(n if rowwise else 1), torch.randn(n)
    op = ts.ops.int8_matmul_rowwise_dequantize if rowwise else ts.ops.int8_matmul_mixed_dequantize
    for bias_ in (bias, None):
        expected = op(a, b, absmax_a, absmax_b, bias_, dtype)
        out = torch.full((m, n), 99, dtype=dtype, device="cuda")
        args = (
            a.cuda(),
            b.cuda(),
            absmax_a.cuda(),
            absmax_b.cuda(),
            None if bias_ is None else bias_.cuda(),
            dtype,
            out,
        )
        planned(int8_matmul.plan_int8_matmul, absmax_per_col=rowwise, config=CONFIGS[config])(*args)
        assert_same(out, expected)


@strategies
@dtypes
@pytest.mark.parametrize("shape", [(64, 96, 128), (1024, 512, 768), (333, 131, 257)], ids=str)
def test_layer(shape, dtype, config):
    tokens, in_features, out_features = shape
    layer = make_layer(config, in_features, out_features, dtype=dtype)
    x, grad = torch.randn(tokens, in_features).to(dtype), torch.randn(tokens, out_features).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        layer.to(device)
        x_ = x.to(device).requires_grad_()
        y = layer(x_)
        results.append((y, *torch.autograd.grad(y, (x_, layer.weight, layer.bias), grad.to(device))))
    (y, grad_input, grad_weight, grad_bias), on_gpu = results
    assert_same(on_gpu[0], y)
    assert_same(on_gpu[1], grad_input)
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]  # cuBLAS's own rounding
    if config.grad_weight == "high_precision":
        torch.testing.assert_close(on_gpu[2].cpu(), grad_weight, rtol=tolerance, atol=tolerance)
    else:
        assert_same_int8_grad_weight(on_gpu[2], grad_weight, x, grad, config)
    torch.testing.assert_close(on_gpu[3].cpu(), grad_bias, rtol=tolerance, atol=tolerance)


def test_run_to_run():
    layer = ts.SwitchBackLinear(1024, 768, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16)
    first = layer(x)
    for _ in range(20):
        assert torch.equal(layer(x), first)


@pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="only Hopper runs the TMA kernels")
def test_hopper_matmuls_take_tma_where_they_can():
    """The names of the kernels that ran show it."""
    names = []
    for tokens, inner, cols in ((16384, 4096, 4096), (16384, 4095, 4096), (16384, 4096, 4095), (1, 4096, 4096)):
        a, b, absmax = (
            random_int8(tokens, inner, "cuda"),
            random_int8(cols, inner, "cuda"),
            torch.rand(tokens, device="cuda"),
        )
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            ts.ops.int8_matmul_mixed_dequantize(a, b.t(), absmax, absmax[:1], None)
            torch.cuda.synchronize()
        names += [event.key for event in profiler.key_averages() if event.key.startswith("int8_matmul")]
    assert names == 2 * ["int8_matmul_warp_specialized_kernel"] + 2 * ["int8_matmul_kernel"]


def test_a_configuration_that_does_not_fit_gives_way_to_a_plainer_one(monkeypatch):
    too_large = MatmulConfig("tma", 128, 256, 128, group_m=8, num_stages=16, num_warps=8)
    monkeypatch.setattr(int8_matmul, "matmul_config", lambda *args, **kwargs: too_large)
    monkeypatch.setattr(int8_matmul, "_replaced", {})
    monkeypatch.setattr(launch, "plans", {})
    a, absmax = random_int8(256, 1024), torch.rand(256)
    expected = ts.ops.int8_matmul_mixed_dequantize(a, a.t(), absmax, absmax[:1], None)
    on_gpu = a.cuda(), a.t().cuda(), absmax.cuda(), absmax[:1].cuda()
    with pytest.warns(UserWarning, match="instead of"):
        assert_same(ts.ops.int8_matmul_mixed_dequantize(*on_gpu, None), expected)
    assert_same(ts.ops.int8_matmul_mixed_dequantize(*on_gpu, None), expected)  # and says so once
