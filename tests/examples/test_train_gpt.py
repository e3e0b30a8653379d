"""The demo as its users run it: a script in another process. The preset `tiny` takes seconds."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("matplotlib", reason="the demo needs torch-switchback[demo]")
pytest.importorskip("typer", reason="the demo needs torch-switchback[demo]")

from typer.testing import CliRunner

import torch_switchback
import train_gpt
from corpus import load_corpus
from training import Settings, learning_rate_at

SCRIPT = Path(train_gpt.__file__)
FLAGS = ("--preset", "tiny", "--steps", "60", "--recipe", "linear", "--recipe", "switchback", "--seed", "7")
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(torch_switchback.__file__).parents[1]),  # the library that this process tests
    "OMP_NUM_THREADS": "1",  # threads that wait for each other on a busy machine take longer than one
    "COLUMNS": "80",
}


def start(*command: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT, text=True, encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


class Finished(NamedTuple):
    output: str
    out: Path
    document: dict[str, Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run of two recipes that nothing interrupts."""
    cwd = tmp_path_factory.mktemp("finished")
    process = start(sys.executable, str(SCRIPT), *FLAGS, cwd=cwd)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    out = cwd / "runs" / "demo"
    return Finished(output, out, json.loads((out / "results.json").read_text()))


class Interrupted(NamedTuple):
    returncode: int
    output: str
    checkpoint: Path
    cwd: Path


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """The same run, interrupted in its second recipe."""
    cwd = tmp_path_factory.mktemp("interrupted")
    process = start(sys.executable, str(SCRIPT), *FLAGS, cwd=cwd)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("switchback: validation loss"):
            break
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    return Interrupted(process.returncode, output, cwd / "runs" / "demo" / "checkpoint.pt", cwd)


def test_table_compares_the_recipes(finished: Finished) -> None:
    linear = next(line.split() for line in finished.output.splitlines() if re.match(r" linear +\d", line))
    switchback = next(line.split() for line in finished.output.splitlines() if re.match(r" switchback +\d", line))
    linear_loss, switchback_loss = float(linear[1]), float(switchback[1])
    assert linear[2] == "-"
    assert float(switchback[2].rstrip("%")) == pytest.approx(100 * (switchback_loss / linear_loss - 1), abs=0.01)
    assert 0 < int(linear[-1].rstrip("%")) < 100


def test_picture_is_a_png(finished: Finished) -> None:
    assert (finished.out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_results_say_where_they_come_from(finished: Finished) -> None:
    document = finished.document
    settings = {"preset": "tiny", "recipes": ["linear", "switchback"], "steps": 60, "seed": 7, "compile": False}
    assert document["settings"].items() >= settings.items()
    assert document["corpus"]["sha256"] == load_corpus().sha256
    for result in document["results"]:
        assert len(result["curve"]["train_losses"]) == 60
        assert [step for step, _ in result["curve"]["validation_losses"]] == list(range(5, 61, 5))
        assert 0 < result["linear_share"] < 1
        assert result["environment"]["torch"] == torch.__version__
        assert result["environment"].keys() >= {
            "date",
            "device",
            "driver",
            "python",
            "triton",
            "git_commit",
            "git_dirty",
        }


def test_every_recipe_starts_alike_and_learns(finished: Finished) -> None:
    linear, switchback = (result["curve"]["train_losses"] for result in finished.document["results"])
    assert switchback[0] == pytest.approx(linear[0], rel=1e-3)
    assert linear != switchback
    for losses in (linear, switchback):
        assert losses[-1] < losses[0] - 1.5


def test_interrupt_leaves_a_checkpoint_of_tensors_and_plain_values(interrupted: Interrupted) -> None:
    assert interrupted.returncode == 130
    checkpoint = torch.load(interrupted.checkpoint, weights_only=True)
    assert checkpoint["run"]["recipe"] == "switchback"
    assert 5 <= checkpoint["run"]["step"] < 60
    assert [result["recipe"] for result in checkpoint["results"]] == ["linear"]


def test_printed_command_resumes_to_the_same_losses_to_the_bit(interrupted: Interrupted, finished: Finished) -> None:
    command = shlex.split(interrupted.output.splitlines()[-1])
    process = start(*command, cwd=interrupted.cwd)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    resumed = json.loads((interrupted.checkpoint.parent / "results.json").read_text())
    assert resumed["settings"] == finished.document["settings"]
    for ours, theirs in zip(resumed["results"], finished.document["results"], strict=True):
        assert ours["recipe"] == theirs["recipe"]
        assert ours["final_validation_loss"] == theirs["final_validation_loss"]
        for name in ("train_losses", "validation_losses"):
            assert ours["curve"][name] == theirs["curve"][name]


def test_divergence_is_reported_and_fails(tmp_path: Path) -> None:
    flags = ("--preset", "tiny", "--recipe", "linear", "--learning-rate", "1e30")
    process = start(sys.executable, str(SCRIPT), *flags, cwd=tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "linear: the training loss is nan after 2 steps; try a lower --learning-rate than 1e+30" in output


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(train_gpt.app, arguments)
    assert result.exit_code == 2, result.output
    return result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--recipe", "int4"),
            "unknown recipe 'int4'; known: linear, switchback, switchback_memory_efficient",
        ),
        (("--preset", "tpu"), "unknown preset 'tpu'; known: cpu, gpu"),
        (("--preset", "tiny", "--steps", "0"), "steps must be at least 1, got 0"),
        (("--learning-rate", "-1"), "learning rate must be positive, got -1.0"),
        (("--resume", "nowhere.pt"), "'nowhere.pt' does not exist"),
    ],
)
def test_wrong_flags_are_named(arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the preset needs")
def test_gpu_preset_needs_a_gpu() -> None:
    assert "needs a CUDA device" in refused("--preset", "gpu")


def test_checkpoint_of_another_preset_is_refused(interrupted: Interrupted) -> None:
    message = refused("--resume", str(interrupted.checkpoint), "--preset", "cpu")
    assert "the checkpoint's run has preset tiny, not cpu" in message


def test_checkpoint_on_another_corpus_is_refused(interrupted: Interrupted, tmp_path: Path) -> None:
    checkpoint = torch.load(interrupted.checkpoint, weights_only=True)
    torch.save(checkpoint | {"corpus_sha256": "0"}, tmp_path / "moved.pt")
    assert "standard library of another Python" in refused("--resume", str(tmp_path / "moved.pt"))


def test_other_files_are_not_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("text")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pt")
    for name in ("text.pt", "weights.pt"):
        assert "is not a checkpoint" in refused("--resume", str(tmp_path / name))


def test_all_means_every_recipe_once() -> None:
    assert train_gpt.expand_recipes(["rowwise", "all"]) == [
        "rowwise",
        "linear",
        "switchback",
        "switchback_memory_efficient",
        "rowwise_memory_efficient",
    ]


def test_learning_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    settings = Settings("tiny", ["linear"], steps=100, seed=0, learning_rate=1.0, compile=False)
    rates = [learning_rate_at(step, settings) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[100] == pytest.approx(0)
    assert rates[9:] == sorted(rates[9:], reverse=True)
