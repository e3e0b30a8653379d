"""rotate_features: row-wise int8 values of rows rotated along their columns, and the layer whose matmuls they feed."""

import copy

import pytest
import torch
from torch import nn

import torch_switchback as ts
from testing import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    assert_same,
    assert_same_within_one_step,
    gradients,
    make_layer,
    signal_to_noise,
)
from torch_switchback import SwitchBackConfig
from torch_switchback.analysis.monitor import measure
from torch_switchback.functional import quantize_weight
from torch_switchback.ops._hadamard import rotate, rotate_features, rotate_features_back
from torch_switchback.ops.prepared_weight import dequantize_rotated

BLOCKS = [16, 32, 64, 128]
blocks = pytest.mark.parametrize("block", BLOCKS)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
ROTATED = SwitchBackConfig("rowwise", rotate_features=16)


# The operation


@blocks
def test_rotation_leaves_the_product(block):
    x, w = torch.randn(7, 2 * block, dtype=torch.float64), torch.randn(5, 2 * block, dtype=torch.float64)
    x_rotated, w_rotated = rotate(x, block, dim=1), rotate(w, block, dim=1)
    torch.testing.assert_close(x_rotated @ w_rotated.t(), x @ w.t(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("block", "shape"), [*((32, shape) for shape in SHAPES), (16, (20, 37)), (64, (20, 131)), (128, (20, 131))]
)
@layouts
@dtypes
def test_int8_values_are_those_of_the_rotated_columns(dtype, layout, shape, block, device):
    x = layout(*shape, dtype, device)
    qdata, absmax = ts.ops.quantize_rowwise(x, rotate_features=block)
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % block))
    expected_qdata, expected_absmax = ts.ops.quantize_rowwise(rotate(padded.t(), block).t())
    assert qdata.shape == (shape[0], -(-shape[1] // block) * block)
    assert_same_within_one_step((qdata, absmax), (expected_qdata, expected_absmax))
    if device == "cpu":
        assert_same(absmax, expected_absmax)
        assert_same(qdata, expected_qdata)


@blocks
def test_both_rotations_are_one(block):
    """The inner dimension of an operand is rotated alike along the rows and the columns."""
    x = torch.randn(3 * block - 5, 40)
    for by_columns, by_rows in zip(
        ts.ops.quantize_columnwise_and_transpose(x, rotate_tokens=block),
        ts.ops.quantize_rowwise(x.t(), rotate_features=block),
        strict=True,
    ):
        assert_same(by_columns, by_rows)


@blocks
def test_rotated_back_it_is_what_it_was(block):
    x = torch.randn(7, 3 * block)
    torch.testing.assert_close(rotate_features_back(rotate_features(x, block), block), x, rtol=0, atol=1e-5)
    whole = torch.randint(-127, 128, (7, 3 * block)).float()
    exact = rotate(rotate_features_back(whole, block).double(), block, dim=1)
    torch.testing.assert_close(exact, whole.double(), rtol=0, atol=1e-4)


@blocks
@pytest.mark.parametrize("values", [[float("nan")], [float("inf")], [float("inf"), float("inf")], [-float("inf")]])
def test_what_is_not_finite_marks_its_row_and_no_other(values, block, device):
    x = torch.randn(5, 2 * block, device=device)
    for col, value in enumerate(values):
        x[3, col] = value
    qdata, absmax = ts.ops.quantize_rowwise(x, rotate_features=block)
    assert absmax.isfinite().tolist() == [True, True, True, False, True]
    assert not qdata[3].any()


@pytest.mark.parametrize("block", [0, 1, 8, 48, 256, -16])
def test_only_blocks_that_there_are(block, device):
    with pytest.raises(
        ValueError, match=f"quantize_rowwise: rotate_features must be one of 16, 32, 64, 128, got {block}"
    ):
        ts.ops.quantize_rowwise(torch.randn(4, 64, device=device), block)


@pytest.mark.parametrize("block", [16, 128])
@dtypes
def test_opcheck(dtype, block, device):
    for layout in LAYOUTS[:-1]:
        x = layout(17, 83, dtype, device)
        torch.library.opcheck(torch.ops.torch_switchback.quantize_rotated_rowwise.default, (x, block))


# The layer; what every strategy guarantees is tested in test_functional.py


@pytest.mark.parametrize("grad_weight", ["high_precision", "int8"])
@blocks
def test_of_the_same_operands_it_is_the_exact_matmul(block, grad_weight, device):
    """Features that the block does not divide, too."""
    layer = make_layer(SwitchBackConfig("rowwise", rotate_features=block, grad_weight=grad_weight), 83, 70, device)
    x, grad = torch.randn(37, 83, device=device), torch.randn(37, 70, device=device)
    y, grad_input, grad_weight_, _ = gradients(layer, x, grad)

    def product(a, b, bias=None):
        (a_int8, a_absmax), (b_int8, b_absmax) = a, b
        return ts.ops.int8_matmul_rowwise_dequantize(a_int8, b_int8.t(), a_absmax, b_absmax, bias, torch.float32)

    def rows(x):
        return ts.ops.quantize_rowwise(x, rotate_features=block)

    assert torch.equal(y, product(rows(x), rows(layer.weight), layer.bias))
    weight_t = ts.ops.quantize_columnwise_and_transpose(layer.weight, rotate_tokens=block)
    assert torch.equal(grad_input, product(rows(grad), weight_t))
    if grad_weight == "int8":
        columns = (ts.ops.quantize_columnwise_and_transpose(each, rotate_tokens=64) for each in (grad, x))
        assert torch.equal(grad_weight_, product(*columns))
    else:
        assert torch.equal(grad_weight_, grad.t() @ x)


def test_outlier_channels_cost_nothing(device):
    """X has them in the output, G in the input's gradient."""
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(256, 512, generator=generator) for _ in range(2))
    x[:, 7] *= 50
    grad[:, 9] *= 50
    x, grad = x.to(device), grad.to(device)
    noise = {}
    for config in (SwitchBackConfig("rowwise"), SwitchBackConfig("rowwise", rotate_features=64)):
        layer = make_layer(config, 512, 512, device, bias=False)
        nn.init.normal_(layer.weight, generator=torch.Generator(device).manual_seed(2))
        y, grad_input, _ = gradients(layer, x, grad)
        exact = x.double() @ layer.weight.double().t(), grad.double() @ layer.weight.double()
        noise[config] = [signal_to_noise(*each) for each in zip((y, grad_input), exact, strict=True)]
    (plain, rotated) = noise.values()
    assert max(plain) < 30
    assert min(rotated) > 36


def test_cached_int8_values_are_those_of_the_layer(device):
    cached = make_layer(SwitchBackConfig("rowwise", rotate_features=16, cache_quantized_weight=True), 83, 70, device)
    plain = make_layer(ROTATED, 83, 70, device)
    plain.load_state_dict(cached.state_dict())
    x, grad = torch.randn(37, 83, device=device), torch.randn(37, 70, device=device)
    for _ in range(2):
        for actual, expected in zip(gradients(cached, x, grad), gradients(plain, x, grad), strict=True):
            assert torch.equal(actual, expected)


def test_the_monitor_sees_the_rotated_operands(device):
    x = torch.randn(64, 83, device=device)
    x[:, 7] *= 50
    grad = torch.randn(64, 70, device=device)
    records = [
        measure(make_layer(config, 83, 70, device), x, grad) for config in (SwitchBackConfig("rowwise"), ROTATED)
    ]
    assert records[1]["x_crest"] < records[0]["x_crest"] / 2
    assert records[1]["x_zeros"] < records[0]["x_zeros"] / 2
    rotated = rotate_features(x, 16)
    crest = rotated.abs().amax(1) / rotated.square().mean(1).sqrt()
    assert records[1]["x_crest"] == pytest.approx(crest.max().item(), rel=1e-5)


def test_explain_says_the_padded_matmuls(device):
    (layer,) = ts.explain(nn.Sequential(make_layer(ROTATED, 83, 70, device)), tokens=5).layers
    assert layer.strategy == "rowwise, features rotated by 16"
    assert [(matmul.m, matmul.n, matmul.k) for matmul in layer.matmuls[:2]] == [(5, 70, 96), (5, 83, 80)]


# What it does not go with


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotate_features": 48}, "rotate_features must be one of None, 16, 32, 64, 128, got 48"),
        ({"weight_scaling": "global"}, "rotate_features=64 needs weight_scaling='rowwise', got 'global'"),
        ({"mem_efficient": True}, "rotate_features=64 needs mem_efficient=False, got True"),
        ({"all_gather": "int8"}, "rotate_features=64 needs all_gather='high_precision', got 'int8'"),
    ],
)
def test_config_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        SwitchBackConfig(**{"weight_scaling": "rowwise", "rotate_features": 64} | arguments)


# Prepared


def test_a_prepared_layer_keeps_both_matmuls_accurate(device):
    """X has large channels, W large rows: the first spoil the output without the rotation, the second grad_input."""
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(256, 512, generator=generator) for _ in range(2))
    grad = torch.randn(256, 256, generator=generator)
    weight[9] *= 50
    x[:, 7] *= 50
    noise = []
    for config in (SwitchBackConfig("rowwise"), SwitchBackConfig("rowwise", rotate_features=64)):
        layer = make_layer(config, 512, 256, device, bias=False)
        layer.weight.data.copy_(weight)
        layer.prepare_for_eval()
        y, grad_input = gradients(layer, x.to(device), grad.to(device))
        exact = x.double() @ weight.double().t(), grad.double() @ weight.double()
        noise.append([signal_to_noise(*each) for each in zip((y.cpu(), grad_input.cpu()), exact, strict=True)])
    plain, rotated = noise
    assert max(plain) < 30
    assert min(rotated) > 33


@pytest.mark.parametrize("cached", [False, True])
@blocks
def test_the_backward_of_a_prepared_layer_requantizes_what_it_keeps(block, cached, device):
    config = SwitchBackConfig("rowwise", rotate_features=block, cache_quantized_weight=cached)
    layer = make_layer(config, 83, 70, device)
    x, grad = torch.randn(37, 83, device=device), torch.randn(37, 70, device=device)
    before = layer(x)
    layer.prepare_for_eval()
    assert layer.weight_int8.shape == (70, -(-83 // block) * block)
    assert layer.weight_rotation.item() == block
    kept = copy.deepcopy(layer)
    kept.prepare_for_training()
    for _ in range(2):
        y, grad_input, _ = gradients(layer, x, grad)
        assert torch.equal(y, before)
        _, of_kept, *_ = gradients(kept, x, grad)
        assert signal_to_noise(grad_input, of_kept) > 40  # the int8 values of the columns differ by a step at most


@pytest.mark.parametrize("width", [81, 82, 84, 96])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_input_that_only_fits_whole_blocks_is_refused(width, compiled, device):
    layer = make_layer(ROTATED, 83, 70, device)
    layer.prepare_for_eval()
    call = torch.compile(layer, backend="eager") if compiled else layer
    with pytest.raises(ValueError, match=r"must have shape \(\*, 83\)"):
        call(torch.randn(5, width, device=device))


def test_requantizing_through_bfloat16_adds_little_noise(device):
    """Beside float32: 1 % of the noise of grad_input in docs/performance-log.md."""
    generator = torch.Generator().manual_seed(1)
    weight, grad = (torch.randn(1024, 1024, generator=generator).to(device) for _ in range(2))
    qdata, absmax = ts.ops.quantize_rowwise(weight, rotate_features=64)
    grad_int8, grad_absmax = ts.ops.quantize_rowwise(grad, rotate_features=64)
    in_float32 = ts.ops.quantize_columnwise_and_transpose(dequantize_rotated(qdata, absmax, 64), rotate_tokens=64)
    noise = []
    for transposed, scales in (torch.ops.torch_switchback.requantize_rotated(qdata, absmax, 64), in_float32):
        operands = grad_int8, transposed.t(), grad_absmax, scales, None, torch.float32
        error = ts.ops.int8_matmul_rowwise_dequantize(*operands).double() - grad.double() @ weight.double()
        noise.append(error.square().sum().item())
    assert 1.0 < noise[0] / noise[1] < 1.02


def test_int8_values_that_are_rotated_in_another_way_are_refused(device):
    layers = [make_layer(config, device=device) for config in (SwitchBackConfig("rowwise"), ROTATED)]
    layers.append(make_layer(SwitchBackConfig("rowwise", rotate_features=64), device=device))
    for layer in layers:
        layer.prepare_for_eval()
    for source in layers:
        for target in layers:
            fresh = make_layer(target.config, device=device)
            before = fresh.weight.clone()
            if source is target:
                assert fresh.load_state_dict(source.state_dict()) == ([], [])
                assert torch.equal(fresh.weight_int8, source.weight_int8)
                continue
            given, own = (each.config.rotate_features for each in (source, target))
            with pytest.raises(RuntimeError, match=f"comes with rotate_features={given}, the layer has {own}"):
                fresh.load_state_dict(source.state_dict())
            assert torch.equal(fresh.weight, before)


def test_int8_values_of_the_weight_rotated_back(device):
    layer = make_layer(ROTATED, 83, 70, device)
    qdata, absmax = quantize_weight(layer.weight, ROTATED)
    weight = dequantize_rotated(qdata, absmax, 16)
    assert signal_to_noise(weight[:, :83], layer.weight.detach()) > 38
    assert weight[:, 83:].abs().max() <= absmax.max() / 127 * 4  # 16 half steps at most, times 1 / sqrt(16)
