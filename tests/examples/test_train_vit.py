"""The vision transformer, run as a user runs it: a few steps of each kind of layer."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from vit import ViTConfig, gratings

SCRIPT = Path(__file__).parents[2] / "examples" / "train_vit.py"


def test_both_recipes_start_alike_and_learn(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--preset", "cpu", "--steps", "30"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    line = r"(\S+): loss ([\d.]+) -> ([\d.]+), accuracy ([\d.]+)% of new images, [\d,]+ images/s"
    lines = re.findall(line, done.stdout)
    assert [recipe for recipe, *_ in lines] == ["linear", "switchback"]
    (first, last, _), (ours_first, ours_last, _) = (map(float, values) for _, *values in lines)
    assert abs(ours_first - first) < 0.01
    assert last < first - 0.3
    assert ours_last < ours_first - 0.3


def test_images_depend_on_the_seed_alone() -> None:
    config = ViTConfig(32, 8, width=16, depth=1, heads=1)
    first, again, other = (gratings(config, 4, seed=seed, device=torch.device("cpu")) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (4, 3, 32, 32)
