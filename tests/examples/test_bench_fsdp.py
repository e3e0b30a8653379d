"""benchmarks/bench_fsdp.py under torchrun, on gloo."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist
from test_train_fsdp import torchrun

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_fsdp.py"

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")


def test_runs_take_turns_and_train_alike(tmp_path):
    output = tmp_path / "out.json"
    torchrun(tmp_path, str(SCRIPT), "--preset", "tiny", "--mode", "eager", "--rounds", "2", "--output", str(output))
    linear, plain, int8 = json.loads(output.read_text())["results"]
    assert [record["all_gather"] for record in (linear, plain, int8)] == ["high_precision", "high_precision", "int8"]
    assert linear["speed_up"] == 1
    assert plain["loss"] == pytest.approx(linear["loss"], rel=0.01)
    assert int8["loss"] == pytest.approx(linear["loss"], rel=0.01)
    assert plain["bytes_per_step"] == linear["bytes_per_step"]
    assert "all-gather uint8" in int8["bytes_per_step"]
