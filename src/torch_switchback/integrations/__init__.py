"""Bridges to other libraries. They use the public API and what prepares layers, and import their library when needed.

Importing this tells the core which of them must know of prepared layers. It imports none of the libraries.
"""

import sys
import warnings
from weakref import WeakKeyDictionary, ref

from torch import nn

from .. import extensions
from ..nn import SwitchBackLinear

_models: WeakKeyDictionary[nn.Module, ref[nn.Module]] = WeakKeyDictionary()
"""Layer -> the outermost Transformers model in which it was converted or prepared."""


def _tell_transformers(module: nn.Module) -> None:
    """Have Transformers models save the int8 values of prepared layers."""
    modeling = sys.modules.get("transformers.modeling_utils")  # without it no model can be one of Transformers
    if modeling is None:
        return
    if isinstance(module, SwitchBackLinear):  # prepared by itself, or as one of many
        model = _models[module]() if module in _models else None
        quantizer = getattr(model, "hf_quantizer", None)
        if model is None or (quantizer is not None and quantizer.quantization_config.quant_method == "switchback"):
            return
    else:
        model = module
        parts = [part for part in model.modules() if isinstance(part, modeling.PreTrainedModel)]
        for part in reversed(parts):
            _models.update({layer: ref(part) for layer in part.modules() if isinstance(layer, SwitchBackLinear)})
        is_prepared = any(isinstance(layer, SwitchBackLinear) and layer.is_prepared for layer in model.modules())
        if not parts or not (is_prepared or any(hasattr(part, "hf_quantizer") for part in parts)):
            return
    try:
        from .transformers import follow_prepared_layers
    except ImportError as error:  # of another version
        warnings.warn(f"save_pretrained loses the int8 values of prepared layers: {error}", stacklevel=5)
    else:
        follow_prepared_layers(model)


extensions.observers.append(_tell_transformers)
