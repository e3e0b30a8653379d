"""A step's output and input gradient are the stated arithmetic bit for bit (docs/numerics.md), every time."""

import pytest
import torch

from test_int8_matmul import expected as dequantized_matmul
from test_quantize import expected_qdata
from testing import assert_same, dtypes, gradients, make_layer, unrotated


def rowwise(x):
    absmax = x.float().abs().amax(1)
    return expected_qdata(x, absmax[:, None]), absmax


def quantized_weight(weight, scaling):
    if scaling == "rowwise":
        return rowwise(weight)
    absmax = weight.float().abs().max().view(1)
    return expected_qdata(weight, absmax), absmax


@unrotated
@dtypes
@pytest.mark.parametrize("shape", [(33, 83, 17), (128, 64, 96)], ids=str)
def test_a_step_is_the_stated_arithmetic(shape, dtype, config, device):
    tokens, in_features, out_features = shape
    layer = make_layer(config, in_features, out_features, device)
    weight = layer.weight.detach()
    x = torch.randn(tokens, in_features, device=device).to(dtype)
    grad = torch.randn(tokens, out_features, device=device).to(dtype)
    (x_int8, x_absmax), (grad_int8, grad_absmax) = rowwise(x), rowwise(grad)
    qdata, absmax = quantized_weight(weight, config.weight_scaling)
    qdata_t, absmax_t = quantized_weight(weight.t(), config.weight_scaling)
    output = dequantized_matmul(x_int8, qdata.t(), x_absmax, absmax, layer.bias.detach(), dtype)
    grad_input = dequantized_matmul(grad_int8, qdata_t.t(), grad_absmax, absmax_t, None, dtype)
    for _ in range(3):
        y, grad_x, *_ = gradients(layer, x, grad)
        assert_same(y, output)
        assert_same(grad_x, grad_input)
