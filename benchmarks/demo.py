"""Import what the benchmarks share with the demo in examples/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from corpus import Corpus, load_corpus
from dit import FLUX, DiT, DiTConfig, flow
from gpt import GPT, GPTConfig, RotaryEmbedding
from pictures import BASELINE, DARK, GREY, color, draw_losses
from presets import PRESETS
from report import draw_run
from training import Run, Settings, descend, learning_rate_at, new_optimizer

__all__ = [
    "BASELINE",
    "DARK",
    "FLUX",
    "GPT",
    "GREY",
    "PRESETS",
    "Corpus",
    "DiT",
    "DiTConfig",
    "GPTConfig",
    "RotaryEmbedding",
    "Run",
    "Settings",
    "color",
    "descend",
    "draw_losses",
    "draw_run",
    "flow",
    "learning_rate_at",
    "load_corpus",
    "new_optimizer",
]
