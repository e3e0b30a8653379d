"""Training steps of models from Transformers and timm: nn.Linear, SwitchBack's recipes and torchao's float8.

    python benchmarks/bench_real_models.py
    python benchmarks/bench_real_models.py --only ViT BERT --modes compiled --recommended

A step is a forward, the loss, a backward, a fused AdamW step and ``zero_grad``, on one random batch.
Models are built from their configurations, so nothing is downloaded. Their weights are in float32
and they compute under bfloat16 autocast, unless the weights are bfloat16. Attention is PyTorch's
``scaled_dot_product_attention``. In mode "compiled" the blocks are compiled one by one.

Layers are converted as ``convert_to_switchback`` converts by default. "recommended" converts as
``recommend`` says. torchao's float8 is compiled only, and leaves the LM head or classifier alone.

A record has the ``loss`` of step LOSS_STEPS, from the same weights and batch. ``int8_layers`` is how
many of the ``linear_layers`` compute in int8 for this batch. Peak memory is that of a step:
parameters, gradients, activations and the optimizer's state.
"""

import argparse
import functools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_switchback as ts
from blocks import new_on
from measure import SPEED_UP, SUSTAINED_MS, Bench, Candidate, Cycle, Mode, find, free_memory, ratio, run, speed_up
from peers import TORCHAO, compile_in_place, convert
from results_file import Record
from torch_switchback.analysis.layer_calls import layer_calls

RECOMMENDED = "recommended"
EAGER = ("linear", "switchback", "switchback_int8_grad_weight")
NAMES: dict[Mode, tuple[str, ...]] = {"eager": EAGER, "compiled": (*EAGER, "torchao float8 tensorwise")}
BY_DEFAULT = {"linear": None} | ts.RECIPES  # peers.RECIPES are int8 for any number of tokens
LOSS_STEPS = 3
Batch = tuple[dict[str, Tensor], Tensor]  # the model's keyword arguments, and labels
Loss = Callable[[nn.Module, dict[str, Tensor], Tensor], Tensor]


class Model(NamedTuple):
    """A model of another library, and what it is trained on."""

    name: str  # with the batch size
    new: Callable[[], nn.Module]
    block_classes: tuple[str, ...]  # of the modules that are compiled one by one
    new_batch: Callable[[torch.device], Batch]
    loss: Loss
    dtype: torch.dtype = torch.float32  # of the parameters

    def __str__(self) -> str:
        return self.name

    @property
    def weights(self) -> str:
        return "bf16" if self.dtype == torch.bfloat16 else "fp32, autocast"

    def blocks(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return the blocks of such a model, by name."""
        return {fqn: part for fqn, part in module.named_modules() if type(part).__name__ in self.block_classes}

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.float32)


# Transformers


def new_transformers_model(class_name: str, **config: Any) -> nn.Module:
    import transformers

    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(attn_implementation="sdpa", use_cache=False, **config))


def transformers_loss(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    return model(**inputs, labels=labels).loss


def new_text(device: torch.device, batch: int, tokens: int, vocabulary: int) -> Batch:
    ids = torch.randint(vocabulary, (batch, tokens), device=device)
    return {"input_ids": ids}, ids


def text_model(
    name: str, class_name: str, block: str, batch: int, tokens: int, dtype: torch.dtype = torch.float32, **config: Any
) -> Model:
    """Return a language model. config: its Transformers configuration, where it is not the class's default."""
    new = partial(new_transformers_model, class_name, **config)
    new_batch = partial(new_text, batch=batch, tokens=tokens, vocabulary=config["vocab_size"])
    return Model(f"{name}, {batch}×{tokens} tokens", new, (block,), new_batch, transformers_loss, dtype)


def llama(
    width: int,
    depth: int,
    batch: int,
    tokens: int,
    *,
    intermediate: int,
    head_width: int = 64,
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Model:
    config = {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": intermediate, "vocab_size": 32000}
    heads = width // head_width
    config |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads or heads, "max_position_embeddings": 4096}
    name = f"Llama {width} × {depth}"
    return text_model(name, "LlamaForCausalLM", "LlamaDecoderLayer", batch, tokens, dtype, **config)


def qwen3(batch: int, tokens: int, depth: int = 28, width: int = 1024, intermediate: int = 3072) -> Model:
    """Return Qwen3-0.6B by default."""
    config = {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": intermediate}
    config |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 128, "head_dim": 128}
    config |= {"vocab_size": 151936, "tie_word_embeddings": True}
    name = f"Qwen3 {width} × {depth}"
    return text_model(name, "Qwen3ForCausalLM", "Qwen3DecoderLayer", batch, tokens, **config)


def bert(batch: int, tokens: int, depth: int = 12, width: int = 1024) -> Model:
    """Return a BERT of BERT-large's width by default."""
    config = {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": 4 * width}
    config |= {"num_attention_heads": width // 64, "vocab_size": 30522}
    return text_model(f"BERT {width} × {depth}", "BertForMaskedLM", "BertLayer", batch, tokens, **config)


def new_speech(device: torch.device, batch: int, frames: int, tokens: int) -> Batch:
    ids = torch.randint(50000, (batch, tokens), device=device)
    return {"input_features": torch.randn(batch, 80, frames, device=device), "decoder_input_ids": ids}, ids


def whisper(batch: int, tokens: int, depth: int = 12, width: int = 768, positions: int = 1500) -> Model:
    """Return Whisper-small by default: an encoder of half as many positions as frames, and a decoder of tokens."""
    config = {"d_model": width, "max_source_positions": positions}
    for part in ("encoder", "decoder"):
        sizes = {"layers": depth, "attention_heads": width // 64, "ffn_dim": 4 * width}
        config |= {f"{part}_{key}": size for key, size in sizes.items()}
    new = partial(new_transformers_model, "WhisperForConditionalGeneration", **config)
    new_batch = partial(new_speech, batch=batch, frames=2 * positions, tokens=tokens)
    classes = ("WhisperEncoderLayer", "WhisperDecoderLayer")
    name = f"Whisper {width} × {depth} + {depth}, {batch}×{positions} and {batch}×{tokens} tokens"
    return Model(name, new, classes, new_batch, transformers_loss)


# timm


def new_timm_model(name: str, **changes: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=1000, **changes)


def timm_loss(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    return F.cross_entropy(model(**inputs), labels)


def new_images(device: torch.device, batch: int, size: int) -> Batch:
    return {"x": torch.randn(batch, 3, size, size, device=device)}, torch.randint(1000, (batch,), device=device)


def image_model(name: str, timm_name: str, block: str, batch: int, img_size: int = 224, **changes: Any) -> Model:
    """Return a classifier. changes: what differs from the model of that name in timm."""
    if img_size != 224 and block != "ConvNeXtBlock":  # a convolutional model takes any size
        changes["img_size"] = img_size
    new_batch = partial(new_images, batch=batch, size=img_size)
    new = partial(new_timm_model, timm_name, **changes)
    return Model(f"{name}, {batch} image{'s' * (batch > 1)}", new, (block,), new_batch, timm_loss)


def vit(size: str, batch: int, **changes: Any) -> Model:
    """Return a ViT of size S, B, L or H. L and H are cut to 12 blocks."""
    timm_name = {
        "S": "vit_small_patch16_224",
        "B": "vit_base_patch16_224",
        "L": "vit_large_patch16_224",
        "H": "vit_huge_patch14_224",
    }[size]
    return image_model(f"ViT-{size} × 12", timm_name, "Block", batch, **{"depth": 12} | changes)


llama_4096 = partial(llama, 4096, 4, intermediate=14336, head_width=128, kv_heads=8, dtype=torch.bfloat16)
MODELS = (
    llama_4096(batch=4, tokens=4096),
    llama_4096(batch=1, tokens=512),
    llama(2048, 12, batch=8, tokens=2048, intermediate=8192, kv_heads=8),
    llama(2048, 8, batch=1, tokens=1024, intermediate=8192),
    llama(1024, 12, batch=8, tokens=1024, intermediate=4096),
    llama(1024, 12, batch=1, tokens=512, intermediate=4096),
    qwen3(batch=4, tokens=1024),
    bert(batch=32, tokens=512),
    bert(batch=8, tokens=128),
    whisper(batch=16, tokens=128),
    vit("H", batch=128),
    vit("H", batch=8),
    vit("L", batch=128),
    vit("L", batch=16),
    vit("L", batch=1),
    vit("B", batch=256),
    vit("B", batch=8),
    vit("S", batch=64),
    image_model("EVA-02-B", "eva02_base_patch14_224", "EvaBlock", batch=64),
    image_model("ConvNeXt-B", "convnext_base", "ConvNeXtBlock", batch=64),  # its four widths compile one by one
)
TINY_MODELS = (
    llama(64, 2, batch=2, tokens=16, intermediate=96, head_width=32, kv_heads=1, dtype=torch.bfloat16),
    llama(32, 2, batch=2, tokens=16, intermediate=48, head_width=16),
    qwen3(batch=2, tokens=16, depth=2, width=128, intermediate=96),
    bert(batch=2, tokens=16, depth=2, width=64),
    whisper(batch=2, tokens=16, depth=2, width=64, positions=32),
    *(vit(size, batch=2, img_size=28 if size == "H" else 32, depth=2, embed_dim=32, num_heads=2) for size in "SBLH"),
    image_model("ConvNeXt", "convnext_base", "ConvNeXtBlock", 2, 32, depths=(1, 1, 2, 1), dims=(16, 32, 48, 64)),
    image_model("EVA-02", "eva02_base_patch14_224", "EvaBlock", 2, 28, depth=2, embed_dim=48, num_heads=2),
)


def inner_layers(model: nn.Module) -> Callable[[nn.Module, str], bool]:
    """Return a filter of linear layers: those that float8 can compute, without the LM head or classifier.

    float8's matmuls need multiples of 16.
    """
    methods = (getattr(model, name, None) for name in ("get_output_embeddings", "get_classifier"))
    heads = [method() for method in methods if method is not None]

    def is_inner(module: nn.Module, fqn: str) -> bool:
        return isinstance(module, nn.Linear) and module not in heads and not any(n % 16 for n in module.weight.shape)

    return is_inner


def count_int8_layers(model: nn.Module, sample: dict[str, Tensor]) -> int:
    """Run the model on a sample, and return how many of its layers compute in int8 for as many tokens as they get."""
    return sum(any(call.in_int8 for call in calls) for _, calls in layer_calls(model, sample).values())


def training_step(
    parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor], learning_rate: float = 1e-4
) -> Callable[[], Tensor]:
    """Return a function that does a training step and returns its loss."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, fused=True)

    def step() -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def measure(bench: Bench, model: Model) -> list[Record]:
    device = bench.device
    inputs, labels = model.new_batch(device)

    @functools.cache  # for both modes
    def recommended_config() -> dict[str, Any]:
        with model.autocast(device):
            config = ts.recommend(new_on(device, model.new, model.dtype), inputs).config
        free_memory(device)  # of the model, so that no step's peak has it
        return config

    def converted(name: str) -> nn.Module:
        config = recommended_config() if name == RECOMMENDED else None
        torch.manual_seed(0)
        module = new_on(device, model.new, model.dtype)
        if name == RECOMMENDED:
            return ts.convert_to_switchback(module, config=config)
        if name in TORCHAO or bench.tiny:  # by default no layer of a toy would be in int8
            return convert(module, name, module_filter_fn=inner_layers(module))
        return convert(module, name, BY_DEFAULT, module_filter_fn=None)

    def build(name: str, mode: Mode, notes: Record) -> Cycle:
        allocated = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        module = converted(name)

        def loss() -> Tensor:
            with model.autocast(device):
                return model.loss(module, inputs, labels)

        notes["linear_layers"] = sum(isinstance(part, nn.Linear) for part in module.modules())
        if name != "linear" and name not in TORCHAO:
            with model.autocast(device):
                notes["int8_layers"] = count_int8_layers(module, inputs)
        for block in model.blocks(module).values():
            compile_in_place(block, mode, tiny=bench.tiny)
        step = training_step(module.parameters(), loss)
        torch.manual_seed(0)  # for dropout
        notes["loss"] = [step() for _ in range(LOSS_STEPS)][-1].item()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            notes["peak_bytes"] = torch.cuda.max_memory_allocated() - allocated  # above the shared batch
        return [step]

    records: list[Record] = []
    for mode in bench.options.modes:
        candidates = []
        for name in (*NAMES[mode], *[RECOMMENDED] * bench.options.recommended):
            notes: Record = {}
            candidates.append(Candidate(name, partial(build, name, mode, notes), mode, SUSTAINED_MS, notes))
        labels_of = {"label": f"{model}, {mode}", "model": model.name, "weights": model.weights}
        found = bench.compare(candidates, **labels_of)
        linear = find(found, name="linear")
        for record in found:
            record |= speed_up(record, linear)
            record["peak_over_linear"] = ratio(record.get("peak_bytes"), linear and linear.get("peak_bytes"))
        records += found
    return records


COLUMNS = {
    "name": ("layers", "{}"),
    "mode": ("mode", "{}"),
    "median_ms": ("ms", "{:.2f}"),
    **SPEED_UP,
    "peak_bytes": ("peak, bytes", "{:,d}"),
    "peak_over_linear": ("over nn.Linear", "{:.2f}"),
    "loss": ("loss", "{:.4f}"),
    "int8_layers": ("int8", "{:d}"),
    "linear_layers": ("of layers", "{:d}"),
}


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--modes", nargs="+", choices=NAMES, default=list(NAMES), help="by default both")
    options.add_argument("--recommended", action="store_true", help="also what recommend chooses, seconds per model")
    run(
        "bench_real_models",
        measure,
        cases=MODELS,
        tiny=TINY_MODELS,
        columns=COLUMNS,
        seconds=3.0,
        budget=540.0,
        options=options,
        libraries=("transformers", "timm"),
        argv=argv,
    )


if __name__ == "__main__":
    main()
