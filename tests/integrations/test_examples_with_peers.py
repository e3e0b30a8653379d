"""The examples that need other libraries, run as a user runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *arguments, cwd):
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("flags", [[], ["--lora"]])
def test_finetune_llama(flags, tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    output = run("finetune_llama.py", "--steps", "20", "--monitor-every", "10", *flags, cwd=tmp_path)
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+) nats", output).groups())
    assert last < first - 0.3
    noise = [float(snr) for snr in re.findall(r"step \d+: .* ([\d.]+) dB above the noise", output)]
    assert len(noise) == (0 if flags else 2)
    assert all(snr > 25 for snr in noise)
    saved = tmp_path / "runs" / "llama" / ("adapter_model.safetensors" if flags else "model.safetensors")
    assert saved.exists()
