"""What the benchmarks share with the demo in examples/: its GPT, its recipes, and where numbers come from."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from gpt import GPT, GPTConfig, RotaryEmbedding
from presets import RECIPES
from report import environment

__all__ = ["GPT", "RECIPES", "GPTConfig", "RotaryEmbedding", "environment"]
