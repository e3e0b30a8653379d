"""List what the demo can train: linear layers to compare, and a model, data and schedule per kind of machine."""

from dataclasses import dataclass, replace

import torch_switchback as ts
from gpt import GPTConfig
from torch_switchback import SwitchBackConfig

# None leaves the model's nn.Linear layers as they are. The others are int8 for any number of tokens: the models are
# small, and by default some of their layers would compute as nn.Linear.
RECIPES: dict[str, SwitchBackConfig | None] = {"linear": None} | {
    name: replace(ts.RECIPES[name], min_tokens=0)
    for name in ("switchback", "switchback_memory_efficient", "rowwise", "rowwise_memory_efficient")
}


@dataclass(frozen=True)
class Preset:
    device: str
    bf16: bool  # autocast over fp32 weights
    compile: bool  # the default of --compile
    model: GPTConfig
    batch_size: int  # sequences a step
    steps: int  # the default of --steps
    learning_rate: float  # the default of --learning-rate: the peak of the schedule
    steps_per_sync: int  # reading a loss waits for the GPU, so do that once in this many steps
    validation_interval: int  # steps, a multiple of steps_per_sync
    validation_batches: int


PRESETS = {
    "cpu": Preset(
        device="cpu",
        bf16=False,
        compile=False,
        model=GPTConfig(context=128, width=256, depth=2, heads=4),
        batch_size=8,
        steps=240,
        learning_rate=2e-3,
        steps_per_sync=1,
        validation_interval=40,
        validation_batches=32,
    ),
    "gpu": Preset(
        device="cuda",
        bf16=True,
        compile=True,
        model=GPTConfig(context=1024, width=1024, depth=4, heads=16),
        batch_size=32,
        steps=1000,
        learning_rate=6e-4,
        steps_per_sync=10,
        validation_interval=100,
        validation_batches=16,
    ),
    # For train_fsdp.py: 202 M parameters, so that gathering the weights is work.
    "large": Preset(
        device="cuda",
        bf16=True,
        compile=True,
        model=GPTConfig(context=1024, width=1024, depth=16, heads=16),
        batch_size=32,
        steps=300,
        learning_rate=4e-4,
        steps_per_sync=10,
        validation_interval=100,
        validation_batches=16,
    ),
    # 805 M parameters in layers as wide as an 8 B model's: the GPUs bind, not the host.
    "wide": Preset(
        device="cuda",
        bf16=True,
        compile=True,
        model=GPTConfig(context=1024, width=4096, depth=4, heads=32),
        batch_size=32,
        steps=200,
        learning_rate=2e-4,
        steps_per_sync=10,
        validation_interval=100,
        validation_batches=16,
    ),
    # Says only whether everything runs.
    "tiny": Preset(
        device="cpu",
        bf16=False,
        compile=False,
        model=GPTConfig(context=32, width=64, depth=1, heads=2),
        batch_size=4,
        steps=10,
        learning_rate=3e-3,
        steps_per_sync=1,
        validation_interval=5,
        validation_batches=2,
    ),
}
