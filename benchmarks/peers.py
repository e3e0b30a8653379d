"""The layers that are compared: nn.Linear, SwitchBack's recipes and torchao's layers."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import torch_switchback as ts
from measure import Mode
from shapes import Shape
from torch_switchback import SwitchBackConfig, convert_to_switchback

RECIPES: dict[str, SwitchBackConfig | None] = {"linear": None} | {
    name: replace(ts.RECIPES[name], min_tokens=0)  # always int8, on small layers too
    for name in (
        "switchback",
        "switchback_memory_efficient",
        "rowwise",
        "rowwise_memory_efficient",
        "switchback_int8_grad_weight",
        "rowwise_rotated_features",
    )
}
TORCHAO_FLOAT8 = {f"torchao float8 {recipe}": recipe for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp")}
TORCHAO_INT8 = "torchao int8"
TORCHAO = (*TORCHAO_FLOAT8, TORCHAO_INT8)


def is_not_the_head(module: nn.Module, fqn: str) -> bool:
    return isinstance(module, nn.Linear) and fqn != "head"


def convert(
    model: nn.Module,
    name: str,
    recipes: Mapping[str, SwitchBackConfig | None] = RECIPES,
    module_filter_fn: Callable[[nn.Module, str], bool] | None = is_not_the_head,
) -> nn.Module:
    """Convert the linear layers of a model in place.

    Args:
        model: a module that is not an nn.Linear itself.
        name: one of recipes, or of TORCHAO.
        recipes: None leaves nn.Linear as it is.
        module_filter_fn: which layers, by default all but the one called "head". None: the library's own choice.

    Returns:
        The same model. Raises what torchao raises, and ImportError if it is not installed.
    """
    if name in TORCHAO_FLOAT8:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig.from_recipe_name(TORCHAO_FLOAT8[name])
        convert_to_float8_training(model, config=config, module_filter_fn=module_filter_fn)
    elif name == TORCHAO_INT8:
        from torchao.prototype.quantized_training import int8_mixed_precision_training
        from torchao.quantization import quantize_

        _tune_quickly()
        # Without module_swap torchao 0.18 computes nn.Linear's own output, bit for bit, on torch 2.11 to 2.13.
        quantize_(model, int8_mixed_precision_training(module_swap=True), filter_fn=module_filter_fn)
    elif recipes[name] is not None:
        convert_to_switchback(model, config=recipes[name], module_filter_fn=module_filter_fn)
    return model


def _tune_quickly() -> None:
    """Let torchao time its 27 configurations of a matmul for a tenth of the usual time each."""
    try:
        import triton
        from torchao.prototype.quantized_training.int8_mm import _scaled_int8_mm_kernel
    except ImportError:  # without Triton it uses torch._int_mm
        return
    _scaled_int8_mm_kernel.do_bench = partial(triton.testing.do_bench, warmup=2, rep=10)


def compile_in_place(module: nn.Module, mode: Mode, *, tiny: bool) -> None:
    """Compile a module for static shapes if the mode says so. Toys skip code generation."""
    if mode in ("compiled", "reduce-overhead"):
        torch._dynamo.config.recompile_limit = 64  # candidates share the code of their modules
        options = {"backend": "eager"} if tiny else {"mode": "default" if mode == "compiled" else mode}
        module.compile(dynamic=False, **options)


def gradients(module: nn.Module, x: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
    """Run forward and backward. Return the gradients of x and of all parameters."""
    return torch.autograd.grad(module(x), (x, *module.parameters()), grad_output)


def new_layer(name: str, shape: Shape, device: torch.device) -> nn.Module:
    linear = nn.Linear(shape.in_features, shape.out_features, device=device, dtype=torch.bfloat16)
    return convert(nn.Sequential(linear), name)[0]  # torchao replaces children only
