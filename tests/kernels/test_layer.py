"""The tests of the layer again, with every operation computed by its interpreted kernel instead of plain torch."""

import importlib
import pkgutil

import pytest
import torch
from test_kernels import poisoned
from torch.utils._python_dispatch import TorchDispatchMode

import test_functional
import test_int8_matmul
import test_quantize
from testing import assert_same, assert_same_int8_grad_weight, gradients, make_layer, unrotated
from torch_switchback import kernels
from torch_switchback.kernels import int8_matmul
from torch_switchback.tuning import MatmulConfig

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")

MODULES = [
    importlib.import_module(f"{kernels.__name__}.{module.name}")
    for module in pkgutil.iter_modules(kernels.__path__)
    if not module.name.startswith("_") and module.name != "int8_matmul_warp_specialized"
]


class Interpreted(TorchDispatchMode):
    """Runs launchers, on outputs shaped as the meaning's and poisoned, wherever an operation is called."""

    def __init__(self):
        super().__init__()
        self.launched = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace != "torch_switchback":
            return result
        name = func.name().partition("::")[2].partition(".")[0]
        (make,) = {getattr(module, f"plan_{name}") for module in MODULES if hasattr(module, f"plan_{name}")}
        is_tuple = isinstance(result, tuple)
        outputs = tuple(poisoned(*out.shape, dtype=out.dtype) for out in (result if is_tuple else (result,)))
        make(*args, *outputs)(*args, *outputs)
        self.launched.add(name)
        return outputs if is_tuple else outputs[0]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    config = MatmulConfig("pointer", 32, 32, 64, group_m=2, num_stages=2, num_warps=4)
    monkeypatch.setattr(int8_matmul, "matmul_config", lambda *args, **kwargs: config)
    with Interpreted() as mode:
        yield mode


@unrotated
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_step_is_the_cpus(dtype, config, interpreted):
    layer = make_layer(config, 83, 70)
    x, grad = torch.randn(37, 83).to(dtype), torch.randn(37, 70).to(dtype)
    step = gradients(layer, x, grad)
    assert len(interpreted.launched) >= 3
    for actual, again in zip(step, gradients(layer, x, grad), strict=True):
        assert_same(actual, again)
    with torch.utils._python_dispatch._disable_current_modes():
        expected = gradients(layer, x, grad)
    (y, grad_input, grad_weight, grad_bias), (*wanted, wanted_weight, wanted_bias) = step, expected
    for actual, each in zip((y, grad_input, grad_bias), (*wanted, wanted_bias), strict=True):
        assert_same(actual, each)
    if config.grad_weight == "high_precision":
        assert_same(grad_weight, wanted_weight)
    else:
        assert_same_int8_grad_weight(grad_weight, wanted_weight, x, grad, config)


# What pytest finds in this module runs as above.
test_shapes = test_functional.test_shapes
test_odd_sizes = test_functional.test_odd_sizes
test_any_layout_of_input_and_gradient = test_functional.test_any_layout_of_input_and_gradient
test_rows_do_not_depend_on_their_batch = test_functional.test_rows_do_not_depend_on_their_batch
test_nan_and_inf_reach_their_row_and_no_other = test_functional.test_nan_and_inf_reach_their_row_and_no_other
test_nan_in_the_weight = test_functional.test_nan_in_the_weight
test_zeros_stay_zeros = test_functional.test_zeros_stay_zeros
test_grad_scaler_skips_a_step_with_nan = test_functional.test_grad_scaler_skips_a_step_with_nan
test_float16_result_overflows_to_inf_and_others_do_not = (
    test_int8_matmul.test_float16_result_overflows_to_inf_and_others_do_not
)
test_a_power_of_two_leaves_the_int8_values = test_quantize.test_a_power_of_two_leaves_the_int8_values
test_the_flush_limit_is_where_127_over_absmax_overflows = (
    test_quantize.test_the_flush_limit_is_where_127_over_absmax_overflows
)
