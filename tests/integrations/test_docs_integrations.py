"""The Python blocks of docs/integrations.md, in order, as one program; and its table of versions."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
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
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 7
    names = {}
    for block in blocks:
        exec(compile(block, "docs/integrations.md", "exec"), names)


def test_the_table_names_the_versions_that_these_tests_run_with():
    rows = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|", PAGE, re.MULTILINE))
    assert rows == {library: version(distribution) for library, distribution in DISTRIBUTIONS.items()}
