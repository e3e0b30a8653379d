"""The competitors among layers: nn.Linear, SwitchBack's strategies and torchao's low-precision training."""

from typing import Any

import torch
from torch import nn

from demo import RECIPES
from measure import Mode
from torch_switchback import convert_to_switchback

TORCHAO_FLOAT8 = {f"torchao float8 {recipe}": recipe for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp")}
TORCHAO_INT8 = "torchao int8"
TORCHAO = (*TORCHAO_FLOAT8, TORCHAO_INT8)


def convert(model: nn.Module, name: str) -> nn.Module:
    """Give the linear layers of a model, but the one called "head", to a competitor; in place.

    Args:
        model: not an nn.Linear itself.
        name: a recipe of the demo, or one of TORCHAO.

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

        quantize_(model, int8_mixed_precision_training(), filter_fn=is_ours)
    elif RECIPES[name] is not None:
        convert_to_switchback(model, config=RECIPES[name], module_filter_fn=is_ours)
    return model


def compile_in_place(module: nn.Module, mode: Mode, *, tiny: bool) -> None:
    """torch.compile a module if the mode says so, for its very shapes; toys skip code generation."""
    if mode == "compiled":
        torch._dynamo.config.recompile_limit = 64  # competitors share the code of their modules
        options: dict[str, Any] = {"backend": "eager"} if tiny else {}
        module.compile(dynamic=False, **options)


def gradients(module: nn.Module, x: torch.Tensor, grad_output: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Forward and backward: the gradients of x and of all parameters, none of them accumulated."""
    return torch.autograd.grad(module(x), (x, *module.parameters()), grad_output)
