"""The operation that stands for a layer in a program of torch.export or torch.jit.trace, which train through it.

Such a program holds operations alone, without the autograd Function around them. This one has it inside.
"""

from typing import Any

import torch

from .config import SwitchBackConfig
from .functional import Call, SwitchBackFunction, autocast_input, check, has_int8_grad_weight, refuse_transforms
from .ops._library import LIBRARY


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_absmax: torch.Tensor | None,
    bias: torch.Tensor | None,
    weight_scaling: Any,
    mem_efficient: bool,
    grad_weight: Any,
    rotate_tokens: int | None,
    rotate_features: int | None,
) -> torch.Tensor:
    if torch._C._are_functorch_transforms_active():
        refuse_transforms()
    x = autocast_input(x)
    config = SwitchBackConfig(
        weight_scaling=weight_scaling,
        mem_efficient=mem_efficient,
        grad_weight=grad_weight,
        rotate_tokens=rotate_tokens,
        rotate_features=rotate_features,
    )
    check(x, weight, bias, weight_absmax, config)
    if torch.onnx.is_in_onnx_export():
        raise NotImplementedError(
            "ONNX has no operation for SwitchBackLinear: revert_switchback(model) makes its layers nn.Linear"
        )
    call = Call(config, None, None, has_int8_grad_weight(config, weight))
    return SwitchBackFunction.apply(x, weight, weight_absmax, None, None, bias, call)


def _trainable_linear(*args: Any) -> torch.Tensor:
    """Run the layer with its gradients, or pass the operation on where there are none: decompositions keep it whole."""
    if torch.is_grad_enabled():
        return _linear(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.torch_switchback.linear.default(*args)


LIBRARY.define(
    "linear(Tensor x, Tensor weight, Tensor? weight_absmax, Tensor? bias, str weight_scaling, bool mem_efficient, "
    "str grad_weight, int? rotate_tokens, int? rotate_features) -> Tensor"
)
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("linear", _linear, _key)
LIBRARY.impl("linear", _trainable_linear, "Autograd")
torch.library.register_fake(
    "torch_switchback::linear",
    lambda x, weight, *_: autocast_input(x).new_empty((*x.shape[:-1], weight.shape[0])),
    lib=LIBRARY,
)
