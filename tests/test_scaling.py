"""Schemes: what each quantizes, and that a scheme of one's own is asked."""

import pytest
import torch

from torch_switchback import SwitchBackConfig, ops
from torch_switchback.functional import Call, SwitchBackFunction
from torch_switchback.ops._library import dispatched
from torch_switchback.scaling import GlobalScaling, RowwiseScaling, Scaling, scaling_for

SCHEMES = {"global": SwitchBackConfig(), "rowwise": SwitchBackConfig("rowwise")}
schemes = pytest.mark.parametrize("config", SCHEMES.values(), ids=SCHEMES)


@pytest.fixture
def weight(device):
    return torch.randn(48, 64, device=device)


@schemes
def test_the_weight_is_quantized_by_its_name(config, weight):
    scheme = scaling_for(config, weight)
    quantize = {"global": ops.quantize_global, "rowwise": ops.quantize_rowwise}[config.weight_scaling]
    for actual, expected in zip(scheme.quantize_weight(weight), quantize(weight), strict=True):
        assert torch.equal(actual, expected)
    assert scheme.quantize_weight(weight)[1].shape == (config.scales_of(48),)


@schemes
def test_the_transpose_is_quantized_for_the_columns(config, weight):
    scheme = scaling_for(config, weight)
    (weight_int8, absmax), both = scheme.quantize_weight_with_transpose(weight)
    for transposed, transposed_absmax in (both, scheme.quantize_weight_transpose(weight, absmax)):
        assert transposed.is_contiguous()
        expected = absmax if config.weight_scaling == "global" else weight.abs().amax(0)
        assert torch.equal(transposed_absmax, expected)
        inverse = 127 / expected
        assert torch.equal(transposed, (weight * inverse).round().to(torch.int8).t())
    requantized, _ = scheme.transpose_prepared(weight_int8, absmax)
    assert (requantized.int() - weight_int8.t().int()).abs().max() <= (0 if config.weight_scaling == "global" else 127)


@schemes
def test_rotated_columns_and_rows_come_from_one_pass(config, weight):
    scheme = scaling_for(config, weight)
    *rows, columns, column_absmax = scheme.quantize_rows_and_columns(weight, 16)
    for actual, expected in zip(rows, scheme.quantize_input(weight), strict=True):
        assert torch.equal(actual, expected)
    for actual, expected in zip((columns, column_absmax), scheme.quantize_columns(weight, 16), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("parent", [GlobalScaling, RowwiseScaling])
def test_a_scheme_of_ones_own_quantizes_the_weight(parent, weight):
    """The schemes of the paper quantize the weight within the matmul's operation. A subclass must not be passed by."""
    asked = []

    class Logged(parent):
        def __init__(self, ops):
            super().__init__(ops)
            quantize = self.quantize_weight
            self.quantize_weight = lambda weight: asked.append("weight") or quantize(weight)

        def quantize_weight_transpose(self, weight, absmax):
            asked.append("transpose")
            return super().quantize_weight_transpose(weight, absmax)

    x = torch.randn(5, 64, device=weight.device, requires_grad=True)
    call = Call(SwitchBackConfig(), None, Logged(dispatched), False)
    SwitchBackFunction.apply(x, weight.requires_grad_(), None, None, None, None, call).sum().backward()
    assert asked == ["weight", "transpose"]


@pytest.mark.parametrize(("parent", "config"), [(GlobalScaling, "global"), (RowwiseScaling, "rowwise")])
def test_a_scheme_of_ones_own_serves_prepared_layers(parent, config, weight):
    """Compare it with its parent, with a transpose that is kept and without."""

    class Own(parent):
        pass

    config, own = SCHEMES[config], Own(dispatched)
    qdata, absmax = own.quantize_weight(weight)
    x = torch.randn(5, 64, device=weight.device, requires_grad=True)

    def grad_input(scheme, transposed):
        call = Call(config, None, scheme, False)
        return torch.autograd.grad(SwitchBackFunction.apply(x, qdata, absmax, transposed, None, None, call).sum(), x)[0]

    expected = grad_input(scaling_for(config, weight), None)
    for transposed in (None, qdata.t().contiguous()):
        assert torch.equal(grad_input(own, transposed), expected)


def test_a_scheme_with_arithmetic_of_its_own_serves_prepared_layers(weight):
    """It inherits from Scaling, whose prepared_grad_input calls what the scheme sets."""

    class Doubled(Scaling):
        def __init__(self, ops):
            super().__init__(ops)
            self.quantize_weight = ops.quantize_global
            self.matmul = lambda *args: 2 * ops.int8_matmul_mixed_dequantize(*args)

    own, paper = Doubled(dispatched), SCHEMES["global"]
    qdata, absmax = own.quantize_weight(weight)
    grad = torch.randn(5, weight.shape[0], device=weight.device)
    arguments = grad, qdata, absmax, None, weight.shape[1], torch.float32
    expected = scaling_for(paper, grad).prepared_grad_input(*arguments)
    assert torch.equal(own.prepared_grad_input(*arguments), 2 * expected)
