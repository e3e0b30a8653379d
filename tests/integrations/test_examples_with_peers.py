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


def test_finetune_llama(tmp_path):
    pytest.importorskip("transformers")
    output = run("finetune_llama.py", "--steps", "20", "--monitor-every", "10", cwd=tmp_path)
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+) nats", output).groups())
    assert last < first - 0.3
    noise = [float(snr) for snr in re.findall(r"step \d+: .* ([\d.]+) dB above the noise", output)]
    assert len(noise) == 2
    assert all(snr > 25 for snr in noise)
    assert (tmp_path / "runs" / "llama" / "model.safetensors").exists()


@pytest.mark.parametrize("arguments", [("llama",), ("dit",), ("llama", "--cuda-graphs")], ids=" ".join)
def test_finetune_lora(arguments, tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    output = run("finetune_lora.py", "--model", *arguments, "--steps", "20", cwd=tmp_path)
    before, after = map(float, re.search(r"base: ([\d.]+) -> ([\d.]+) MiB with rowwise", output).groups())
    assert after < 0.4 * before  # float32 layers take 4 bytes, and what is not in a block stays
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+), [\d.,]+ (?:tokens|images)/s", output).groups())
    assert last < first - 0.3
    trained, reloaded = re.search(r"loss ([\d.]+) on new data, ([\d.]+) once reloaded", output).groups()
    assert reloaded == trained
    assert (tmp_path / "runs" / "lora" / "adapter_model.safetensors").exists()
