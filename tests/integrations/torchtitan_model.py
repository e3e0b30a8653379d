"""torchtitan's debug model, small enough for a CPU, with and without the converter."""

from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry

from torch_switchback import SwitchBackConfig
from torch_switchback.integrations.torchtitan import SwitchBackLinearConverter

CONFIG = SwitchBackConfig("rowwise", min_tokens=0)


def converter(config=CONFIG, module_filter_fn=lambda module, fqn: fqn != "lm_head"):
    return SwitchBackLinearConverter.Config(conversion={"config": config, "module_filter_fn": module_filter_fn})


def model_spec(*converters):
    """The first two layers of it."""
    spec = model_registry("debugmodel", converters=list(converters))
    spec.model.layers = spec.model.layers[:2]
    for layer in spec.model.layers:  # the others have no backward on a CPU
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return spec
