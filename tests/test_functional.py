"""Test what switchback_linear and a layer compute: shapes, dtypes, hostile values, autograd, and memory kept."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import torch_switchback as ts
from testing import (
    DTYPES,
    assert_same,
    dtypes,
    gradients,
    make_layer,
    revert_copy,
    signal_to_noise,
    strategies,
    unrotated,
)
from torch_switchback import SwitchBackConfig, SwitchBackLinear
from torch_switchback.functional import Prepared, linear

# Shapes, dtypes and values


@strategies
@pytest.mark.parametrize("leading", [(), (7,), (2, 5), (2, 3, 5), (0,), (2, 0)], ids=str)
def test_shapes(config, leading, device):
    layer = make_layer(config, 6, 4, device)
    x = torch.randn(*leading, 6, device=device, requires_grad=True)
    y = layer(x)
    assert y.shape == (*leading, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.weight.grad.shape == layer.weight.shape
    if x.numel() == 0:
        assert not layer.weight.grad.any()
        assert not layer.bias.grad.any()


@strategies
@pytest.mark.parametrize(("in_features", "out_features"), [(1, 1), (1, 7), (7, 1), (83, 17), (257, 131)])
def test_odd_sizes(config, in_features, out_features, device):
    layer = make_layer(config, in_features, out_features, device)
    x, grad = torch.randn(13, in_features, device=device), torch.randn(13, out_features, device=device)
    reference = gradients(revert_copy(layer), x, grad)
    for actual, expected in zip(gradients(layer, x, grad), reference, strict=True):
        assert signal_to_noise(actual, expected) > 30


@strategies
@pytest.mark.parametrize("leading", [(), (7,), (2, 5), (2, 0)], ids=str)
@pytest.mark.parametrize(("in_features", "out_features"), [(0, 4), (4, 0), (0, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_no_features(config, leading, in_features, out_features, device):
    layer = make_layer(config, in_features, out_features, device)
    x, grad = torch.randn(*leading, in_features, device=device), torch.randn(*leading, out_features, device=device)
    reference = gradients(revert_copy(layer), x, grad)
    for actual, expected in zip(gradients(layer, x, grad), reference, strict=True):
        torch.testing.assert_close(actual, expected)


@strategies
@dtypes
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=lambda dtype: "weight " + str(dtype)[6:])
def test_weight_may_have_another_dtype(config, dtype, weight_dtype, device):
    layer = make_layer(config, device=device, dtype=weight_dtype)
    x = torch.randn(5, 64, device=device, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert layer.weight.grad.dtype == weight_dtype
    assert layer.bias.grad.dtype == weight_dtype


@strategies
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_autocast(config, autocast_dtype, device):
    layer = make_layer(config, device=device)
    x = torch.randn(5, 64, device=device, requires_grad=True)
    with torch.autocast(device, autocast_dtype):
        y = layer(x)
    assert y.dtype == autocast_dtype
    assert torch.equal(y, layer(x.to(autocast_dtype)))
    y.float().sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == torch.float32


@strategies
@pytest.mark.parametrize("what", ["input", "weight", "bias"])
def test_computes_only_the_gradients_asked_for(config, what, device):
    layer = make_layer(config, device=device).requires_grad_(False)
    x = torch.randn(5, 64, device=device)
    wanted = {"input": x, "weight": layer.weight, "bias": layer.bias}[what].requires_grad_()
    layer(x).sum().backward()
    assert [t.grad is not None for t in (x, layer.weight, layer.bias)] == [
        t is wanted for t in (x, layer.weight, layer.bias)
    ]


@strategies
def test_functional_form(config, device):
    layer = make_layer(config, device=device)
    x = torch.randn(5, 64, device=device)
    assert torch.equal(ts.switchback_linear(x, layer.weight, layer.bias, config), layer(x))


def test_functional_form_defaults_to_the_paper(device):
    layer = SwitchBackLinear(64, 48, device=device)
    x = torch.randn(5, 64, device=device)
    assert torch.equal(ts.switchback_linear(x, layer.weight, layer.bias), layer(x))


@strategies
def test_weight_gradient_is_nn_linears(config, device):
    """The default is the same matmul; with mem_efficient X carries int8 noise, in int8 G does too."""
    layer = make_layer(config, device=device, dtype=torch.float32)
    x, grad = torch.randn(300, 64, device=device), torch.randn(300, 48, device=device)
    _, _, ours, bias = gradients(layer, x, grad)
    _, _, theirs, their_bias = gradients(revert_copy(layer), x, grad)
    torch.testing.assert_close(bias, their_bias)
    if config.grad_weight != "high_precision":
        assert signal_to_noise(ours, theirs) > 36.5
    elif config.mem_efficient:
        assert signal_to_noise(ours, theirs) > 38
    else:
        torch.testing.assert_close(ours, theirs)


@dtypes
def test_bias_gradient_accumulates_in_float32(dtype, device):
    """20,000 ones: a 16-bit running sum would stop at 256 (bf16) or 2048 (fp16)."""
    layer = SwitchBackLinear(8, 4, device=device, dtype=dtype)
    layer(torch.zeros(20_000, 8, device=device, dtype=dtype)).sum().backward()
    assert layer.bias.grad.tolist() == [torch.tensor(20_000.0, dtype=dtype).item()] * 4


@strategies
def test_any_layout_of_input_and_gradient(config, device):
    layer = make_layer(config, device=device)
    wide = torch.randn(11, 2 * 64 + 3, device=device)[1:, 1:]
    views = [wide[:, ::2][:, :64], torch.randn(64, 10, device=device).t(), wide[:1, :64].expand(10, 64)]
    for x in views:
        grad = torch.randn(48, 10, device=device).t()
        step, contiguous = gradients(layer, x, grad), gradients(layer, x.contiguous(), grad.contiguous())
        for actual, expected in zip(step, contiguous, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        for actual, expected in zip(step[:2], contiguous[:2], strict=True):  # the output and the input's gradient
            assert torch.equal(actual, expected)


@strategies
def test_any_layout_of_the_weight(config, device):
    bias = torch.randn(2 * 48, device=device)[1::2]
    wide = torch.randn(50, 2 * 64 + 3, device=device)
    for weight in (wide[1:49, 3::2], torch.randn(64, 48, device=device).t(), wide[:1, :64].expand(48, 64)):
        x = torch.randn(5, 64, device=device, requires_grad=True)
        results = []
        for copy_of in (lambda tensor: tensor, torch.Tensor.contiguous):
            y = ts.switchback_linear(x, copy_of(weight), copy_of(bias), config)
            results.append((y, *torch.autograd.grad(y.sum(), x)))
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)


@strategies
def test_a_stride_0_gradient(config, device):
    """y.sum().backward() sends an expanded scalar."""
    layer = make_layer(config, device=device)
    x = torch.randn(10, 64, device=device, requires_grad=True)
    (from_sum,) = torch.autograd.grad(layer(x).sum(), x)
    (from_ones,) = torch.autograd.grad(layer(x), x, torch.ones(10, 48, device=device))
    assert torch.equal(from_sum, from_ones)


@strategies
def test_rows_do_not_depend_on_their_batch(config, device):
    layer = make_layer(config, device=device)
    x = torch.randn(40, 64, device=device)
    assert torch.equal(layer(x)[7:19], layer(x[7:19]))
    order = torch.randperm(40, device=device)
    assert torch.equal(layer(x)[order], layer(x[order]))


@pytest.mark.parametrize("leading", [(), (7,), (2, 5), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_operations_in_place_on_the_output(leading, compiled, device):
    layer = SwitchBackLinear(6, 4, device=device)

    def model(x):
        y = layer(x)
        y += 1.0
        return y.relu_()

    x = torch.randn(*leading, 6, device=device, requires_grad=True)
    y = (torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model)(x)
    y.sum().backward()
    assert torch.equal(y, (layer(x) + 1.0).relu())
    assert x.grad is not None


# Hostile values


@strategies
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen weight"])
def test_nan_and_inf_reach_their_row_and_no_other(config, value, frozen, device):
    layer = make_layer(config, device=device)
    layer.weight.requires_grad_(not frozen)
    x = torch.randn(6, 64, device=device)
    x[2, 5] = value
    assert layer(x).isfinite().all(1).tolist() == [True, True, False, True, True, True]
    assert not layer(x)[2].isfinite().any()

    x = torch.randn(6, 64, device=device, requires_grad=True)
    grad = torch.randn(6, 48, device=device)
    grad[4, 0] = value
    (grad_input,) = torch.autograd.grad(layer(x), x, grad)
    assert not grad_input[4].isfinite().any()
    assert grad_input.isfinite().all(1).sum() == 5


@strategies
def test_nan_in_the_input_reaches_the_weight_gradient(config, device):
    layer = make_layer(config, device=device)
    x = torch.randn(6, 64, device=device)
    x[2, 5] = float("nan")
    layer(x).sum().backward()
    assert not layer.weight.grad[:, 5].isfinite().any()


@strategies
def test_nan_in_the_weight(config, device):
    layer = make_layer(config, device=device)
    with torch.no_grad():
        layer.weight[3, 4] = float("nan")
    finite = layer(torch.randn(6, 64, device=device)).isfinite()
    if config.weight_scaling == "global":
        assert not finite.any()
    else:
        assert not finite[:, 3].any()
        assert finite.sum() == 6 * 47


@strategies
def test_zeros_stay_zeros(config, device):
    layer = make_layer(config, device=device)
    x = torch.randn(6, 64, device=device)
    x[1] = 0
    assert torch.equal(layer(x)[1], layer.bias)
    assert torch.equal(layer(torch.zeros_like(x)), layer.bias.expand(6, 48))
    grad = torch.randn(6, 48, device=device)
    grad[2] = 0
    _, grad_input, grad_weight, _ = gradients(layer, torch.zeros_like(x), grad)
    assert not grad_input[2].any()
    assert grad_input[3].all()
    assert not grad_weight.any()
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(layer(x), layer.bias.expand(6, 48))
    x.requires_grad_()
    (grad_input,) = torch.autograd.grad(layer(x).sum(), x)
    assert not grad_input.any()


@strategies
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_tiny_and_huge_rows_keep_their_accuracy(factor, dtype, config, device):
    layer = make_layer(config, device=device, bias=False)

    def signal_to_noise_of(x, grad):
        y, grad_input, _ = gradients(layer, x, grad)
        weight = layer.weight.detach().double()
        return (
            signal_to_noise(y, x.double() @ weight.t()),
            signal_to_noise(grad_input, grad.double() @ weight),
        )

    x, grad = torch.randn(512, 64, device=device), torch.randn(512, 48, device=device)
    plain = signal_to_noise_of(x.to(dtype), grad.to(dtype))
    scaled = signal_to_noise_of((x * factor).to(dtype), (grad * factor).to(dtype))
    assert scaled == pytest.approx(plain, abs=0.1)


@strategies
def test_a_float16_result_above_its_range_is_inf_as_nn_linears(config, device):
    layer = make_layer(config, device=device)
    with torch.no_grad():
        layer.weight.copy_(torch.randn_like(layer.weight).abs() * 100)
    x = torch.rand(5, 64, device=device) + 50
    x[3:] = 1e-3
    reference = revert_copy(layer).double()(x.double())
    for dtype in DTYPES:
        y = layer(x.to(dtype))
        assert torch.equal(y.isinf(), reference.to(dtype).isinf())
        assert y.isinf().any() == (dtype == torch.float16)
        assert not y.isnan().any()


@unrotated
@pytest.mark.parametrize("inner", [133_144, 133_145, 262_144])
def test_sums_that_int32_cannot_hold(inner, config, device):
    """Sum the output over many features, and the input's gradient over a vocabulary: every int8 value is ±127."""
    signs = torch.tensor([1.0, -1.0, 1.0], device=device)
    with torch.no_grad():
        wide = make_layer(config, inner, 3, device, bias=False)
        wide.weight.copy_(signs[:, None].expand(3, inner))
        expected = signs[:2, None] * signs * inner
        torch.testing.assert_close(wide(signs[:2, None].expand(2, inner)), expected, rtol=1e-6, atol=0)
    tall = make_layer(config, 3, inner, device, bias=False).requires_grad_(False)
    tall.weight.copy_(signs.expand(inner, 3))
    x = torch.zeros(2, 3, device=device, requires_grad=True)
    (grad_input,) = torch.autograd.grad(tall(x), x, signs[:2, None].expand(2, inner))
    torch.testing.assert_close(grad_input, expected, rtol=1e-6, atol=0)


@strategies
def test_grad_scaler_skips_a_step_with_nan(config, device):
    layer = make_layer(config, device=device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler(device)
    before = layer.weight.detach().clone()
    x = torch.randn(4, 64, device=device)
    x[0, 0] = float("inf")
    scaler.scale(layer(x).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layer.weight, before)
    assert scaler.get_scale() < 65536


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int64], ids=lambda dtype: str(dtype)[6:])
def test_refuses_other_dtypes(dtype, device):
    layer = SwitchBackLinear(6, 4, device=device)
    with pytest.raises(TypeError, match=f"switchback_linear: x must be float16, bfloat16 or float32, got {dtype}"):
        layer(torch.zeros(2, 6, device=device, dtype=dtype))
    with pytest.raises(TypeError, match="switchback_linear: weight must be"):
        ts.switchback_linear(torch.zeros(2, 6, device=device), torch.zeros(4, 6, device=device, dtype=dtype))


def test_refuses_other_shapes_and_devices(device):
    layer = SwitchBackLinear(6, 4, device=device)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    x = torch.zeros(2, 6, device=device)
    with pytest.raises(ValueError, match=r"x must have shape \(\*, 6\) to match weight, got \(2, 5\)"):
        layer(torch.zeros(2, 5, device=device))
    with pytest.raises(ValueError, match=r"x must have shape \(\*, 6\) to match weight, got \(\)"):
        layer(torch.zeros((), device=device))
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\), got \(3,\)"):
        ts.switchback_linear(x, weight, bias[:3])
    with pytest.raises(ValueError, match="weight must be 2-D"):
        ts.switchback_linear(x, weight[0])
    with pytest.raises(ValueError, match="weight is on meta"):
        ts.switchback_linear(x, weight.to("meta"), bias)


@pytest.mark.parametrize("elsewhere", ["mps", "xla"])
def test_refuses_devices_that_no_operation_knows(elsewhere):
    with FakeTensorMode():
        x, weight = torch.zeros(2, 6, device=elsewhere), torch.zeros(4, 6, device=elsewhere)
    with pytest.raises(ValueError, match=f"switchback_linear: x must be on one of cpu, cuda, meta, got {elsewhere}"):
        ts.switchback_linear(x, weight)


def test_refuses_int8_values_that_do_not_fit(device):
    x, weight = torch.zeros(2, 6, device=device), torch.zeros(4, 6, device=device)
    qdata, absmax = ts.ops.quantize_global(weight)
    rowwise = SwitchBackConfig("rowwise")
    for error, message, arguments in [
        (TypeError, "weight must be int8, got torch.float32", {"weight": weight, "prepared": Prepared(absmax)}),
        (TypeError, "weight_absmax must be float32", {"weight": qdata, "prepared": Prepared(absmax.double())}),
        (
            ValueError,
            r"weight_absmax must have shape \(1,\)",
            {"weight": qdata, "prepared": Prepared(absmax.expand(4))},
        ),
        (
            ValueError,
            r"weight_absmax must have shape \(4,\)",
            {"weight": qdata, "prepared": Prepared(absmax), "config": rowwise},
        ),
        (TypeError, "weight must be float16, bfloat16 or float32, got torch.int8", {"weight": qdata}),
    ]:
        with pytest.raises(error, match=f"switchback_linear: {message}"):
            linear(x, **{"bias": None, "config": SwitchBackConfig()} | arguments)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_nested_tensors_are_refused(layout, device):
    rows = [torch.randn(3, 64, device=device), torch.randn(5, 64, device=device)]
    x = torch.nested.nested_tensor(rows, layout=layout)
    with pytest.raises(TypeError, match=f"switchback_linear: x must not be a NestedTensor, got layout {layout}"):
        make_layer(SwitchBackConfig(), device=device)(x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1.0], "x must be a tensor, got list"),
        (torch.ones(4, 4).to_sparse(), "x must be dense, got layout torch.sparse_coo"),
    ],
)
def test_what_is_no_dense_tensor_is_refused(x, message):
    with pytest.raises(TypeError, match=f"switchback_linear: {message}"):
        ts.switchback_linear(x, torch.ones(4, 4))


@pytest.mark.parametrize(
    "transform",
    [
        lambda layer, x: torch.func.vmap(layer)(x),
        lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x),
        lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
    ],
    ids=["vmap", "grad", "jvp"],
)
def test_transforms_of_torch_func_are_refused_by_name(transform, device):
    with pytest.raises(NotImplementedError, match=r"switchback_linear.*revert_switchback"):
        transform(make_layer(SwitchBackConfig(), device=device), torch.randn(3, 64, device=device))


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return None


@strategies
def test_an_output_without_a_gradient_gives_the_weight_none(config, device):
    layer = make_layer(config, device=device)
    NoGradient.apply(layer(torch.randn(3, 64, device=device))).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is None


def test_a_layer_without_a_weight_is_refused_by_name(device):
    layer = SwitchBackLinear(64, 48, device=device)
    layer.weight = None
    with pytest.raises(TypeError, match="weight"):
        layer(torch.randn(3, 64, device=device))


def test_a_sparse_weight_is_refused(device):
    weight = torch.eye(64, device=device).to_sparse()
    with pytest.raises(TypeError, match="weight"):
        ts.switchback_linear(torch.randn(3, 64, device=device), weight)


def test_a_recipe_is_a_config(device):
    x, weight = torch.randn(4, 8, device=device), torch.randn(6, 8, device=device)
    expected = ts.switchback_linear(x, weight, config=SwitchBackConfig("rowwise"))
    assert torch.equal(ts.switchback_linear(x, weight, config="rowwise"), expected)
    assert SwitchBackLinear(8, 6, config="rowwise_memory_efficient").config == SwitchBackConfig("rowwise", True)


@pytest.mark.parametrize(("config", "error"), [("fp8", ValueError), (8, TypeError)])
def test_what_is_no_config_is_refused(config, error):
    with pytest.raises(error, match="config"):
        ts.switchback_linear(torch.ones(4, 4), torch.ones(4, 4), config=config)
    with pytest.raises(error, match="config"):
        SwitchBackLinear(4, 4, config=config)


# Autograd's rules


@strategies
def test_weight_edited_between_forward_and_backward(config, device):
    layer = make_layer(config, device=device)
    y = layer(torch.randn(4, 64, device=device, requires_grad=True))
    with torch.no_grad():
        layer.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@strategies
def test_backward_twice(config, device):
    layer = make_layer(config, device=device)
    y = layer(torch.randn(4, 64, device=device, requires_grad=True)).sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def sum_of(y):
    """Its gradient is constant: all that depends on something else is the product."""
    return y.sum()


def sum_of_squares(y):
    return y.pow(2).sum()


@strategies
def test_an_input_whose_negation_is_pending(config, device):
    """The .imag of a conjugate has one: its memory holds the other sign."""
    layer = make_layer(config, device=device)
    x = torch.randn(5, 64, dtype=torch.complex64, device=device).conj().imag
    grad = torch.randn(5, 48, dtype=torch.complex64, device=device).conj().imag
    assert x.is_neg()
    assert grad.is_neg()
    expected = gradients(layer, x.resolve_neg(), grad.resolve_neg())
    for actual, wanted in zip(gradients(layer, x, grad), expected, strict=True):
        assert_same(actual, wanted)


@pytest.mark.parametrize("loss", [sum_of, sum_of_squares])
@strategies
def test_double_backward(config, loss, device):
    layer = make_layer(config, device=device)
    x = torch.randn(4, 64, device=device, requires_grad=True)
    for inputs in (x, layer.weight):
        (grad,) = torch.autograd.grad(loss(layer(x)), inputs, create_graph=True)
        with pytest.raises(RuntimeError, match="switchback_linear has no double backward"):
            grad.sum().backward()
    (grad,) = torch.autograd.grad(loss(layer(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="switchback_linear has no double backward"):
        torch.autograd.grad(grad.sum(), layer.weight)


def test_double_backward_through_another_layer(device):
    """create_graph=True is no error in itself, and what does not pass through the layer has its second derivative."""
    model = nn.Sequential(make_layer(ts.SwitchBackConfig(), device=device), nn.Linear(48, 1)).to(device)
    x = torch.randn(4, 64, device=device)
    layer, head = model
    parameters = layer.weight, head.bias
    layer_grad, head_grad = torch.autograd.grad(model(x).pow(2).sum(), parameters, create_graph=True)
    (second,) = torch.autograd.grad(head_grad.sum(), head.bias, retain_graph=True)
    assert_same(second, torch.full_like(head.bias, 2.0 * len(x)))
    with pytest.raises(RuntimeError, match="switchback_linear has no double backward"):
        torch.autograd.grad(layer_grad.sum(), head.weight)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_gradient_penalty_of_a_layer_whose_gradient_is_constant(frozen, device):
    """There is nothing to differentiate, as with a frozen nn.Linear."""
    layer = make_layer(ts.SwitchBackConfig(), device=device)
    layer.weight.requires_grad_(not frozen)
    x = torch.randn(4, 64, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    assert grad.requires_grad == (not frozen)


def test_gradients_with_grad_mode_on(device):
    """A backward within enable_grad builds no graph."""
    layer = make_layer(ts.SwitchBackConfig(), device=device)
    with torch.enable_grad():
        layer(torch.randn(4, 64, device=device, requires_grad=True)).sum().backward()
    assert not layer.weight.grad.requires_grad


@strategies
def test_bytes_kept_for_the_backward(config, device):
    """Beside the parameter: X in 16 bit, or in int8 with a float32 a row or, rotated, a column; and W's absmax."""
    layer = make_layer(config, 1024, 64, device, torch.bfloat16)
    x = torch.randn(256, 1024, device=device, dtype=torch.bfloat16, requires_grad=True)
    parameters = {parameter.data_ptr() for parameter in layer.parameters()}
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    expected = 256 * 1024 + 256 * 4 if config.mem_efficient else 256 * 1024 * 2
    if config.grad_weight != "high_precision":
        expected = 256 * 1024 + 1024 * 4
    absmax_of_weight = 4 if config.weight_scaling == "global" else 64 * 4
    kept_beside_parameters = sum(nbytes for pointer, nbytes in kept.items() if pointer not in parameters)
    assert kept_beside_parameters == expected + absmax_of_weight


@strategies
def test_int8_int8_values_free_the_input(config, device):
    layer = make_layer(config, device=device)
    x = torch.randn(4, 64, device=device, requires_grad=True) * 1.0  # not a leaf: no one else holds it
    freed = weakref.ref(x)
    y = layer(x)
    del x
    gc.collect()
    assert (freed() is None) == (config.mem_efficient or config.grad_weight != "high_precision")
    y.sum().backward()
    gc.collect()
    assert freed() is None


def test_the_input_is_not_kept_for_a_frozen_weight(device):
    layer = SwitchBackLinear(64, 48, device=device)
    layer.weight.requires_grad_(False)
    x = torch.randn(4, 64, device=device, requires_grad=True) * 1.0
    freed = weakref.ref(x)
    y = layer(x)
    del x
    gc.collect()
    assert freed() is None
    y.sum().backward()


class Log(TorchDispatchMode):
    """The names of our operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "torch_switchback" or func is torch.ops.aten.mm.default:
            self.names.append(func.name().partition("::")[2].partition(".")[0])
        return func(*args, **(kwargs or {}))


@unrotated
@pytest.mark.parametrize("needs_input", [True, False])
def test_the_transposed_weight_is_quantized_in_the_backward(config, needs_input, device):
    """Kept from the forward on, it would be a copy of the model in int8."""
    x = torch.randn(4, 64, device=device, requires_grad=needs_input)
    layer = make_layer(config, device=device)
    with Log() as forward:
        y = layer(x)
    with Log() as backward:
        y.sum().backward()
    assert [name for name in forward.names if "linear" in name] == ["int8_linear"]
    assert [name for name in backward.names if "linear" in name] == (["int8_linear_grad_input"] if needs_input else [])
    assert not any("weight" in name or "with_transpose" in name for name in forward.names + backward.names)


@strategies
@pytest.mark.parametrize("is_leaf", [True, False])
def test_autograd_grad_computes_no_other_gradient(config, is_leaf, device):
    """Pipeline schedules split the backward into one for the input and one for the weight."""
    layer = make_layer(config, device=device)
    x = torch.randn(4, 64, device=device, requires_grad=True)
    asked = x if is_leaf else x * 1
    y = layer(asked).sum()
    y.backward(retain_graph=True)
    with Log() as for_input:
        (grad_input,) = torch.autograd.grad(y, asked, retain_graph=True)
    with Log() as for_weight:
        grad_weight, grad_bias = torch.autograd.grad(y, [layer.weight, layer.bias])
    assert torch.equal(grad_input, x.grad)
    assert torch.equal(grad_weight, layer.weight.grad)
    assert torch.equal(grad_bias, layer.bias.grad)
    assert sum("mm" in name or "matmul" in name or "linear" in name for name in for_input.names) == 1
    assert sum("mm" in name or "matmul" in name or "linear" in name for name in for_weight.names) == 1


@strategies
def test_checkpointing_and_offloading(config, device):
    layer = make_layer(config, device=device)
    x, grad = torch.randn(6, 64, device=device), torch.randn(6, 48, device=device)
    plain = gradients(layer, x, grad)
    for reentrant in (False, True):
        x_ = x.clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(layer, x_, use_reentrant=reentrant)
        layer.zero_grad()
        y.backward(grad)
        for actual, expected in zip((y, x_.grad, layer.weight.grad, layer.bias.grad), plain, strict=True):
            assert torch.equal(actual, expected)
    with torch.autograd.graph.save_on_cpu():
        offloaded = gradients(layer, x, grad)
    for actual, expected in zip(offloaded, plain, strict=True):
        assert torch.equal(actual, expected)


def test_inference_mode(device):
    layer = SwitchBackLinear(64, 48, device=device)
    x = torch.randn(4, 64, device=device)
    expected = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
        layer.prepare_for_eval()
        assert torch.equal(layer(x), expected)
    layer(x.clone().requires_grad_()).sum().backward()
