"""PEFT: adapters beside base weights that are kept in int8 alone.

convert_to_switchback(model)
model = freeze_base(get_peft_model(model, LoraConfig(…)))

Of PEFT 0.21's methods for linear layers, these work over a frozen base: LoRA (with rsLoRA, lora_bias, PiSSA, OLoRA,
orthogonal, MiCA, KaSA, VeLoRA, BD-LoRA, MonteCLoRA), AdaLoRA, BEFT, BOFT, C3A, DEFT, DeLoRA, FourierFT, FRoD, GraLoRA,
IA3, Lily, MiSS, OFT, OSF, PSOFT, PVeRA, RandLoRA, RoAd, TinyLoRA, UniLoRA, VB-LoRA, VeRA and WaveFT. The others read
the base's weight in every forward, so freeze_base refuses them: DoRA, target_parameters, LoHa, LoKr, HRA, HiRA, SHiRA,
MiSS with ``"bat"`` (Bone), PEANuT and Supertuning. tests/integrations/test_peft.py runs each of them.

Merging, and adding an adapter that starts from the base's weight, as PiSSA does, raise an AttributeError that says
how to get the weight back. Were the dequantized weight there to read, the merge would add to a copy, which is lost.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from .. import SwitchBackLinear, prepare_for_training
from ..prepared import keep_transposes, prepare_layers, refuse_weights
from ..weight_readers import leave_read_layers
from ._peer import peer

with peer("peft", "peft>=0.18,<1"):
    from peft.tuners.tuners_utils import BaseTunerLayer

Model = TypeVar("Model", bound=nn.Module)


def freeze_base(model: Model) -> Model:
    """Quantize the frozen weights of a PEFT model's SwitchBack layers once and for all, and free them.

    A frozen layer then keeps 1 byte per element. With one absmax per weight its output and input gradient stay the
    same to the bit. The backward transposes the int8 values each time. With
    ``SwitchBackConfig(cache_quantized_weight=True)`` freeze_base does so once, and keeps 2 bytes per element.

    Layers that train, as LoRA's own do, and those whose weight another module uses (a tied LM head) stay as they are.
    If one is refused, nothing changes.

    An adapter that is added or loaded later starts on the CPU, since PEFT places it where the base's weight is: call
    ``model.to(device)`` then.

    Args:
        model: ``get_peft_model`` of a converted model.

    Returns:
        The same model. Its adapters save and load as ever, also over a base that Transformers' ``save_pretrained``
        wrote as int8 values (:func:`adapters_over_int8`). Merge them after :func:`unfreeze_base`.

    Raises:
        ValueError: the model has no adapters; one is merged, or reads its base layer's weight in its forward; or no
            SwitchBack layer is frozen.
        RuntimeError: a frozen layer's weight is computed from others or a DTensor, or DistributedDataParallel holds it.

    Warns:
        UserWarning: a module of the model, as T5's MLP, reads a layer's weight itself, so the layer stays as it is.
    """
    adapters = {fqn: module for fqn, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if not adapters:
        raise ValueError("freeze_base: model has no adapter layers; call get_peft_model first")
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    layers = {
        fqn: module
        for fqn, module in model.named_modules()
        if isinstance(module, SwitchBackLinear)
        and not module.is_prepared
        and not module.weight.requires_grad
        and owners[id(module.weight)] <= 1
    }
    if not layers and not any(getattr(module, "is_prepared", False) for module in model.modules()):
        reason = "all of its SwitchBack layers train, or share their weights"
        if not any(isinstance(module, SwitchBackLinear) for module in model.modules()):
            reason = "convert_to_switchback was not called, or left all layers (conversion_report says why)"
        raise ValueError(f"freeze_base: model has no frozen SwitchBackLinear with a weight of its own: {reason}")
    layers = leave_read_layers("freeze_base", model, layers)
    refuse_weights("freeze_base", model, layers)
    bases = {*layers.values()}
    for fqn, adapter in adapters.items():
        if adapter.merged:
            raise ValueError(f"freeze_base: {fqn} is merged into its base layer; call unmerge_adapter first")
        base = adapter.get_base_layer()
        if base in bases and _reads_weight(adapter, base):
            raise ValueError(
                f"freeze_base: {fqn} ({type(adapter).__module__}.{type(adapter).__name__}) computes with its base "
                "layer's weight, which a frozen base does not have"
            )
    prepare_layers(model, layers.values())
    keep_transposes(model)
    return model


def unfreeze_base(model: Model) -> Model:
    """Undo :func:`freeze_base`: weights in the dtype they had, dequantized. What was rounded away stays away."""
    return prepare_for_training(model)


@contextmanager
def adapters_over_int8(base: nn.Module) -> Iterator[None]:
    """Let PEFT put adapters over layers that are prepared already, as those of a base that was saved as int8 values.

    with adapters_over_int8(base):
        model = PeftModel.from_pretrained(base, path)

    PEFT asks a layer for its weight's shape, dtype and device. Here it is shown a weight of NaN that takes no memory:
    an adapter that starts from the weight's values, as PiSSA's does, raises or becomes NaN. PEFT freezes the weights
    of a base, and so they are when :func:`unfreeze_base` gives them back.

    Args:
        base: a model with prepared layers; others are left alone.
    """
    layers = [layer for layer in base.modules() if isinstance(layer, SwitchBackLinear) and layer.is_prepared]
    for layer in layers:
        nan = torch.full((1, 1), torch.nan, dtype=layer._weight_dtype, device=layer.weight_int8.device)
        vars(layer)["weight"] = nan.expand(layer.out_features, layer.in_features)
    try:
        yield
        for layer in layers:
            if layer.is_prepared:
                layer._freeze_former_weight()
            else:  # unfreeze_base has been called
                layer.weight.requires_grad_(False)
        keep_transposes(base)
    finally:
        for layer in layers:
            vars(layer).pop("weight", None)


def _reads_weight(adapter: BaseTunerLayer, base: SwitchBackLinear) -> bool:
    """Return whether an adapter layer's forward reads the weight of its base layer: run it on a token without one.

    It is run with each of its adapters, as another one may be made active later.
    """
    token = base.weight.new_zeros(1, 1, base.in_features)
    parts = [getattr(adapter, name, None) for name in adapter.adapter_layer_names]
    names = {name for part in parts if isinstance(part, nn.ModuleDict | nn.ParameterDict) for name in part}
    attributes = dict(vars(adapter))
    adapter._disable_adapters = False
    try:
        for active in (adapter._active_adapter, *([name] for name in names)):
            adapter._active_adapter = active
            if _fails_without_weight(adapter, base, token):
                return True
    finally:
        vars(adapter).clear()
        vars(adapter).update(attributes)
    return False


def _fails_without_weight(adapter: nn.Module, base: SwitchBackLinear, token: torch.Tensor) -> bool:
    with _without_weight(base), torch.no_grad(), torch.random.fork_rng([token.device] if token.is_cuda else []):
        try:
            adapter.forward(token)
        except AttributeError as error:
            return error.name == "weight"
        except Exception:  # it takes more than an input, as Poly does
            pass
    return False


@contextmanager
def _without_weight(layer: SwitchBackLinear) -> Iterator[None]:
    """Take away a layer's weight, and have the layer return zeros."""
    attributes, parameters = dict(vars(layer)), dict(layer._parameters)
    del layer._parameters["weight"]
    vars(layer)["forward"] = lambda x: x.new_zeros(*x.shape[:-1], layer.out_features)
    try:
        yield
    finally:
        vars(layer).pop("forward")
        vars(layer).update(attributes)  # a forward of its own, which Accelerate gives layers
        layer._parameters.clear()  # the weight comes first again
        layer._parameters.update(parameters)
