"""The FSDP2 example under torchrun, on gloo: what it reports, and that it survives the death of a rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the demo needs torch-switchback[demo]")
pytest.importorskip("typer", reason="the demo needs torch-switchback[demo]")

import torch.distributed as dist

import torch_switchback

EXAMPLES = Path(__file__).parents[2] / "examples"
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(Path(torch_switchback.__file__).parents[1]), str(EXAMPLES)]),
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "80",
    # Else a restarted group may find the addresses of the one that died (pytorch issue 135712).
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
FLAGS = ("--preset", "tiny", "--steps", "12", "--checkpoint-interval", "4")

# Runs the example, but the first time it is started its rank 1 dies in the middle of step 7.
DYING = """
import os, signal
import train_fsdp

class DyingRun(train_fsdp.ShardedRun):
    def train_step(self):
        if self.step == 6 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_step()

train_fsdp.ShardedRun = DyingRun
train_fsdp.app()
"""

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")


def torchrun(cwd, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("undisturbed")
    recipes = ("--recipe", "switchback", "--recipe", "linear", "--all-gather", "int8", "--all-gather", "high_precision")
    done = torchrun(cwd, str(EXAMPLES / "train_fsdp.py"), *FLAGS, *recipes)
    return done.stdout, json.loads((cwd / "runs/fsdp/results.json").read_text())


def test_results(undisturbed):
    output, document = undisturbed
    assert "switchback, int8 gather" in output and "tiny preset, 12 steps, 2 processes" in output
    assert document["provenance"]["processes"] == 2
    int8, high_precision, linear = document["results"]
    for result in document["results"]:
        assert len(result["curve"]["train_losses"]) == 12
        assert abs(result["final_validation_loss"] / linear["final_validation_loss"] - 1) < 5e-3
    # float32 weights and float32 gathers: the int8 values are the same, so all the rest is.
    assert int8["curve"]["train_losses"] == high_precision["curve"]["train_losses"]


def test_a_rank_that_dies(undisturbed, tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    flags = ("--recipe", "switchback", "--all-gather", "int8", "--checkpoint", "checkpoint")
    done = torchrun(tmp_path, "--max-restarts", "1", str(script), *FLAGS, *flags)
    assert "going on after 4 steps" in done.stdout
    (survived,) = json.loads((tmp_path / "runs/fsdp/results.json").read_text())["results"]
    expected = undisturbed[1]["results"][0]
    assert survived["curve"]["train_losses"] == expected["curve"]["train_losses"]
    assert survived["final_validation_loss"] == expected["final_validation_loss"]


def test_it_must_be_started_by_torchrun(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "train_fsdp.py")], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "start it with torchrun" in done.stderr
