"""The Python blocks of docs/integrations.md, in order, as one program, and its table of versions; and docs/lora.md."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from torch_switchback import SwitchBackLinear

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "integrations.md").read_text()
DISTRIBUTIONS = {
    "open_clip": "open_clip_torch",
    "Lightning": "lightning",
    "Transformers": "transformers",
    "Accelerate": "accelerate",
    "PEFT": "peft",
    "torchtitan": "torchtitan",
}

for distribution in DISTRIBUTIONS.values():
    pytest.importorskip(distribution.removesuffix("_torch"))


@pytest.mark.usefixtures("only_where_it_wins")  # as for the reader
def test_every_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(PAGE)
    assert len(blocks) == 6
    names = {}
    for block in blocks:
        exec(compile(block, "docs/integrations.md", "exec"), names)


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_four_lines_freeze_the_base_of_a_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 8}
    names = {"model": LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))}
    (block,) = python_blocks((DOCS / "lora.md").read_text())
    exec(compile(block, "docs/lora.md", "exec"), names)
    layers = [layer for layer in names["model"].modules() if isinstance(layer, SwitchBackLinear)]
    assert len(layers) == 7 and all(layer.is_prepared for layer in layers)


def test_the_table_names_the_versions_that_these_tests_run_with():
    rows = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|", PAGE, re.MULTILINE))
    assert rows == {library: version(distribution) for library, distribution in DISTRIBUTIONS.items()}
