"""benchmarks/bench_fsdp.py under torchrun, on gloo."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from test_train_fsdp import torchrun

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results file of three runs on two processes."""
    path = tmp_path_factory.mktemp("results") / "bench_fsdp.json"
    flags = ("--preset", "tiny", "--mode", "eager", "--rounds", "2", "--output", str(path))
    torchrun(path.parent, str(BENCHMARKS / "bench_fsdp.py"), *flags)
    return json.loads(path.read_text())


def test_runs_take_turns_and_train_alike(results):
    linear, plain, int8 = results["results"]
    assert [record["all_gather"] for record in (linear, plain, int8)] == ["high_precision", "high_precision", "int8"]
    assert linear["speed_up"] == 1
    assert plain["loss"] == pytest.approx(linear["loss"], rel=0.01)
    assert int8["loss"] == pytest.approx(linear["loss"], rel=0.01)
    assert plain["bytes_per_step"] == linear["bytes_per_step"]
    assert "all-gather uint8" in int8["bytes_per_step"]


@pytest.mark.parametrize("added", [0, 4])
def test_bytes_are_what_the_model_of_scaling_says(added, results, tmp_path):
    changed = copy.deepcopy(results)
    changed["results"][-1]["bytes_per_step"]["all-gather float32"] += added
    path = tmp_path / "results.json"
    path.write_text(json.dumps(changed))
    command = [sys.executable, str(BENCHMARKS / "scaling.py"), "--check", str(path)]
    assert subprocess.run(command, capture_output=True).returncode == (1 if added else 0)
