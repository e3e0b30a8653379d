"""Check what torch.library asks of every operation, on every dtype and layout."""

import pytest
import torch

import torch_switchback  # noqa: F401  (registers the operations)
from testing import DTYPES, LAYOUTS, make_layer, pairwise, random_int8, strategies

OPS = torch.ops.torch_switchback
# opcheck compares outputs and has NaN unequal to itself, so not the layout "hostile".
layouts = pytest.mark.parametrize("layout", LAYOUTS[:-1], ids=lambda layout: layout.__name__)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


@pairwise(dtype=DTYPES, layout=LAYOUTS[:-1], shape=[(17, 83), (1, 5)])
@pytest.mark.parametrize(
    "op",
    [
        "quantize_rowwise",
        "quantize_columnwise_and_transpose",
        "quantize_global",
        "quantize_global_transpose",
        "quantize_global_with_transpose",
    ],
)
def test_quantizers(shape, op, dtype, layout, device):
    torch.library.opcheck(getattr(OPS, op).default, (layout(*shape, dtype, device),))


@layouts
@dtypes
def test_quantize_transpose_by_absmax(dtype, layout, device):
    absmax = torch.full((1,), 1e5, device=device)
    torch.library.opcheck(OPS.quantize_transpose_by_absmax.default, (layout(17, 83, dtype, device), absmax))


@layouts
@dtypes
@pytest.mark.parametrize("scales", [1, 17])
def test_quantize_by_absmax(scales, dtype, layout, device):
    absmax = torch.full((scales,), 1e5, device=device)
    torch.library.opcheck(OPS.quantize_by_absmax.default, (layout(17, 83, dtype, device), absmax))


@dtypes
def test_dequantize_rowwise(dtype, device):
    for x in (random_int8(17, 83, device), random_int8(83, 17, device).t()):
        torch.library.opcheck(OPS.dequantize_rowwise.default, (x, torch.rand(17, device=device), dtype))


@layouts
@dtypes
def test_quantize_folded_rowwise(dtype, layout, device):
    scale = torch.rand(166, device=device)[::2]
    torch.library.opcheck(OPS.quantize_folded_rowwise.default, (layout(17, 83, dtype, device), scale))


def test_what_prepared_layers_make_of_their_int8_values(device):
    for x in (random_int8(17, 96, device), random_int8(96, 17, device).t()):
        torch.library.opcheck(OPS.transpose_int8.default, (x,))
        torch.library.opcheck(OPS.requantize_rotated.default, (x, torch.rand(17, device=device), 32))


@dtypes
@pytest.mark.parametrize("rowwise", [False, True], ids=["global", "rowwise"])
def test_prepared_grad_input(rowwise, dtype, device):
    grad, absmax = torch.randn(17, 48, device=device, dtype=dtype), torch.rand(48 if rowwise else 1, device=device)
    weight_int8 = random_int8(48, 64, device)
    for transposed in (None, weight_int8.t().contiguous()):
        torch.library.opcheck(OPS.prepared_grad_input.default, (grad, weight_int8, absmax, transposed, rowwise, dtype))


@dtypes
@pytest.mark.parametrize("rowwise", [False, True], ids=["mixed", "rowwise"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
def test_matmuls(has_bias, rowwise, dtype, device):
    op = OPS.int8_matmul_rowwise_dequantize if rowwise else OPS.int8_matmul_mixed_dequantize
    state_x, state_w = torch.rand(17, device=device), torch.rand(32 if rowwise else 1, device=device)
    bias = torch.randn(32, device=device) if has_bias else None
    for a, b in (
        (random_int8(17, 64, device), random_int8(32, 64, device).t()),
        (random_int8(64, 17, device).t(), random_int8(64, 32, device)),
    ):
        torch.library.opcheck(op.default, (a, b, state_x, state_w, bias, dtype))


@strategies
def test_an_exported_layer(config, device):
    layer = make_layer(config, device=device)
    x = torch.randn(4, 64, device=device, requires_grad=True)
    flags = config.weight_scaling, config.mem_efficient, config.grad_weight
    arguments = x, layer.weight, None, layer.bias, *flags, config.rotate_tokens, config.rotate_features
    torch.library.opcheck(OPS.linear.default, arguments)
