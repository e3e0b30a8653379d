"""The competitors among layers: nn.Linear, SwitchBack's strategies and torchao's low-precision training.

Strategies are the demo's recipes (examples/presets.py) and those of RECIPES: a line puts one into every benchmark.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import torch_switchback as ts
from demo import RECIPES as DEMO_RECIPES
from measure import SUSTAINED_MS, Contestant, Cycle, Mode
from shapes import Shape
from torch_switchback import convert_to_switchback
from torch_switchback.advice.saved_bytes import saved_bytes

# None leaves nn.Linear as it is.
RECIPES = DEMO_RECIPES | {
    "int8-grad-weight": ts.RECIPES["switchback_int8_grad_weight"],
    "rowwise-rotated-features": ts.RECIPES["rowwise_rotated_features"],
}
TORCHAO_FLOAT8 = {f"torchao float8 {recipe}": recipe for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp")}
TORCHAO_INT8 = "torchao int8"
TORCHAO = (*TORCHAO_FLOAT8, TORCHAO_INT8)


def convert(model: nn.Module, name: str, recipes: Mapping[str, Any] = RECIPES) -> nn.Module:
    """Give the linear layers of a model, but the one called "head", to a competitor; in place.

    Args:
        model: not an nn.Linear itself.
        name: one of recipes, or of TORCHAO.
        recipes: our own competitors, a SwitchBackConfig or None each.

    Returns:
        The same model. Raises what torchao raises, ImportError if it is not installed.
    """

    def is_ours(module: nn.Module, fqn: str) -> bool:
        return isinstance(module, nn.Linear) and fqn != "head"

    if name in TORCHAO_FLOAT8:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig.from_recipe_name(TORCHAO_FLOAT8[name])
        convert_to_float8_training(model, config=config, module_filter_fn=is_ours)
    elif name == TORCHAO_INT8:
        from torchao.prototype.quantized_training import int8_mixed_precision_training
        from torchao.quantization import quantize_

        _tune_quickly()
        # Without module_swap torchao 0.18 computes nn.Linear's own output, bit for bit, on torch 2.11 to 2.13.
        quantize_(model, int8_mixed_precision_training(module_swap=True), filter_fn=is_ours)
    elif recipes[name] is not None:
        convert_to_switchback(model, config=recipes[name], module_filter_fn=is_ours)
    return model


def _tune_quickly() -> None:
    """torchao tries 27 configurations for each shape of a product; a tenth of Triton's usual time will do for each."""
    try:
        import triton
        from torchao.prototype.quantized_training.int8_mm import _scaled_int8_mm_kernel
    except ImportError:  # without Triton it uses torch._int_mm
        return
    _scaled_int8_mm_kernel.do_bench = partial(triton.testing.do_bench, warmup=2, rep=10)


def compile_in_place(module: nn.Module, mode: Mode, *, tiny: bool) -> None:
    """torch.compile a module if the mode says so, for its very shapes; toys skip code generation."""
    if mode in ("compiled", "reduce-overhead"):
        torch._dynamo.config.recompile_limit = 64  # competitors share the code of their modules
        options = {"backend": "eager"} if tiny else {"mode": "default" if mode == "compiled" else mode}
        module.compile(dynamic=False, **options)


def gradients(module: nn.Module, x: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward: the gradients of x and of all parameters, none of them accumulated."""
    return torch.autograd.grad(module(x), (x, *module.parameters()), grad_output)


def gradients_in_one_thread(module: nn.Module, x: Tensor, grad_output: Tensor) -> tuple[Tensor, ...]:
    """The backward in the forward's thread."""
    with torch.autograd.set_multithreading_enabled(False):
        return gradients(module, x, grad_output)


def new_layer(name: str, shape: Shape, device: torch.device) -> nn.Module:
    linear = nn.Linear(shape.in_features, shape.out_features, device=device, dtype=torch.bfloat16)
    return convert(nn.Sequential(linear), name)[0]  # torchao swaps children only


def random_inputs(shape: Shape, copies: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """X [tokens, in] that wants its gradient, and G [tokens, out], in bfloat16; so many pairs."""

    def new(width: int, **kwargs: bool) -> Tensor:
        return torch.randn(shape.tokens, width, device=device, dtype=torch.bfloat16, **kwargs)

    return [(new(shape.in_features, requires_grad=True), new(shape.out_features)) for _ in range(copies)]


def training_step(
    name: str,
    mode: Mode,
    shape: Shape,
    inputs: Sequence[tuple[Tensor, Tensor]],
    *,
    kept: dict[tuple[str, Mode], int] | None = None,
    tiny: bool,
) -> Contestant:
    """A layer's forward and backward on each of the inputs, in sustained turns.

    kept: takes, when the competitor is built, the bytes that it keeps for its backward.
    """

    def build() -> Cycle:
        layer = new_layer(name, shape, inputs[0][0].device)
        compile_in_place(layer, mode, tiny=tiny)
        if mode == "graphed" and inputs[0][0].is_cuda:
            example = inputs[0][0].detach().clone().requires_grad_()  # inputs are copied into it from then on
            layer = torch.cuda.make_graphed_callables(layer, (example,))
        gradients(layer, *inputs[0])  # compiles
        if kept is not None:
            kept[name, mode] = saved_bytes(layer, partial(layer, inputs[0][0]))
        step = gradients_in_one_thread if mode == "one thread" else gradients
        return [partial(step, layer, x, grad) for x, grad in inputs]

    return Contestant(name, build, mode, SUSTAINED_MS)
