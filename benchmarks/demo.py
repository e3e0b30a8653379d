"""What the benchmarks share with the demo in examples/: GPT, training, recipes, and where numbers come from."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from corpus import Corpus, load_corpus
from gpt import GPT, GPTConfig, RotaryEmbedding
from presets import PRESETS, RECIPES, Preset
from report import environment
from training import DivergedError, Run, Settings, descend, learning_rate_at, new_optimizer

__all__ = [
    "GPT",
    "PRESETS",
    "RECIPES",
    "Corpus",
    "DivergedError",
    "GPTConfig",
    "Preset",
    "RotaryEmbedding",
    "Run",
    "Settings",
    "descend",
    "environment",
    "learning_rate_at",
    "load_corpus",
    "new_optimizer",
]
