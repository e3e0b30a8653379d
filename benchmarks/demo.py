"""Import what the benchmarks share with the demo in examples/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from corpus import Corpus, load_corpus
from gpt import GPT, GPTConfig, RotaryEmbedding
from presets import PRESETS
from training import Run, Settings, descend, learning_rate_at, new_optimizer

__all__ = [
    "GPT",
    "PRESETS",
    "Corpus",
    "GPTConfig",
    "RotaryEmbedding",
    "Run",
    "Settings",
    "descend",
    "learning_rate_at",
    "load_corpus",
    "new_optimizer",
]
