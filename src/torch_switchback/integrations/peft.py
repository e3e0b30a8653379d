"""PEFT: LoRA beside base weights that are kept in int8 alone.

convert_to_switchback(model)
model = freeze_base(get_peft_model(model, LoraConfig(…)))
"""

from collections import Counter
from typing import TypeVar

from torch import nn

from .. import SwitchBackLinear
from ._peer import peer

with peer("peft", "peft>=0.18,<1"):
    from peft.tuners.tuners_utils import BaseTunerLayer

Model = TypeVar("Model", bound=nn.Module)


def freeze_base(model: Model) -> Model:
    """Quantize the frozen weights of a PEFT model's SwitchBack layers once and for all, and free them.

    A frozen layer then keeps 1 byte per element. With one absmax per weight its output and input gradient stay the
    same to the bit. The backward transposes the int8 values each time, and with ``"rowwise"`` quantizes them again by
    column; with ``SwitchBackConfig(cache_quantized_weight=True)`` it does so once, and keeps 2 bytes per element.

    Layers that train, as LoRA's own do, and those whose weight another module uses (a tied LM head) stay as they are.
    So do all, if one is refused.

    Args:
        model: ``get_peft_model`` of a converted model.

    Returns:
        The same model. Its adapters save and load as ever; merge them after :func:`unfreeze_base`.

    Raises:
        ValueError: the model has no adapters, or one is merged, or one (as DoRA) computes with the base's weight; or no
            SwitchBack layer is frozen, or one rotates its features.
        RuntimeError: a frozen layer's weight is sharded over processes.
    """
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not adapted:
        raise ValueError("freeze_base: model has no adapter layers; call get_peft_model first")
    for module in adapted:
        if module.merged:
            raise ValueError("freeze_base: adapters are merged into the base; call unmerge_adapter first")
        if any(getattr(module, "lora_variant", {}).values()):
            raise ValueError(f"freeze_base: {type(module).__name__} computes with its base layer's weight: {module}")
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    frozen = [
        module
        for module in model.modules()
        if isinstance(module, SwitchBackLinear)
        and not module.is_prepared
        and not module.weight.requires_grad
        and owners[id(module.weight)] == 1
    ]
    if not frozen and not any(getattr(module, "is_prepared", False) for module in model.modules()):
        raise ValueError(
            "freeze_base: model has no frozen SwitchBackLinear with a weight of its own; call convert_to_switchback "
            "before get_peft_model"
        )
    for module in frozen:  # prepare_for_eval would refuse them too, but after those before them have been freed
        if module.config.rotate_features is not None:
            raise ValueError(f"freeze_base: a frozen layer's rotated features cannot be kept as int8 values: {module}")
        if hasattr(module.weight, "device_mesh"):
            raise RuntimeError(f"freeze_base: a frozen layer's weight is sharded over processes: {module}")
    for module in frozen:
        module.prepare_for_eval()
    return model


def unfreeze_base(model: Model) -> Model:
    """Undo :func:`freeze_base`: weights in the dtype they had, dequantized. What was rounded away stays away."""
    for module in model.modules():
        if isinstance(module, SwitchBackLinear):
            module.prepare_for_training()
    return model
