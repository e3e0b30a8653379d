"""The linear layers of a transformer, from its config.json alone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

GATED = ("silu", "swish", "swiglu")
NAMED_LIKE_LLAMA = frozenset(
    "arcee cohere cohere2 ernie4_5 exaone4 gemma gemma2 gemma3_text granite helium llama ministral mistral nemotron "
    "olmo olmo2 olmo3 qwen2 qwen3 seed_oss smollm3 stablelm".split()
)
"""The model_types whose linear layers have the very names that :func:`transformer` gives them."""


def transformer(config: Mapping[str, Any]) -> nn.Module:
    """A transformer's embedding and linear layers on the meta device, named as Llama's in Hugging Face's library.

    Args:
        config: the content of a config.json, with the names that Llama, GPT-2, BERT or ViT have for the sizes.

    Raises:
        ValueError: a size is missing, or the model is a mixture of experts.
    """
    config = config.get("text_config") or config
    if any("expert" in key for key in config):
        raise ValueError("a mixture of experts computes with packed weights, which are no nn.Linear layers")

    def size(*names: str, default: int | None = None) -> int:
        found = next((config[name] for name in names if config.get(name) is not None), default)
        if not isinstance(found, int) or found < 1:
            raise ValueError(f"config.json has no {' or '.join(names)}")
        return found

    width = size("hidden_size", "n_embd", "d_model", "dim")
    depth = size("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    heads = size("num_attention_heads", "n_head", "num_heads", "n_heads")
    kv_heads = size("num_key_value_heads", default=heads)
    head_width = size("head_dim", default=width // heads)
    hidden = size("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim", default=4 * width)
    activation = str(config.get("hidden_act") or config.get("hidden_activation") or config.get("activation_function"))
    gated = activation in GATED or "gemma" in str(config.get("model_type"))
    attention_bias = bool(config.get("attention_bias", not gated))
    mlp_bias = bool(config.get("mlp_bias", not gated))
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"), torch.bfloat16)

    def block() -> nn.Module:
        queries, keys = heads * head_width, kv_heads * head_width
        attention = {
            "q_proj": nn.Linear(width, queries, attention_bias),
            "k_proj": nn.Linear(width, keys, attention_bias),
            "v_proj": nn.Linear(width, keys, attention_bias),
            "o_proj": nn.Linear(queries, width, attention_bias),
        }
        mlp = {"gate_proj": nn.Linear(width, hidden, mlp_bias)} if gated else {}
        mlp |= {"up_proj": nn.Linear(width, hidden, mlp_bias), "down_proj": nn.Linear(hidden, width, mlp_bias)}
        return nn.ModuleDict({"self_attn": nn.ModuleDict(attention), "mlp": nn.ModuleDict(mlp)})

    with torch.device("meta"):
        body = nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(depth))})
        model = nn.ModuleDict({"model": body})
        if config.get("vocab_size"):
            vocabulary = size("vocab_size")
            body["embed_tokens"] = nn.Embedding(vocabulary, width)
            model["lm_head"] = nn.Linear(width, vocabulary, bias=False)
        return model.to(dtype)
