"""The demo as its users run it: a script in another process. The preset `tiny` takes seconds."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("matplotlib", reason="the demo needs torch-switchback[demo]")
pytest.importorskip("typer", reason="the demo needs torch-switchback[demo]")

from rich.console import Console
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
    """The same run, interrupted after some turns."""
    cwd = tmp_path_factory.mktemp("interrupted")
    process = start(sys.executable, str(SCRIPT), *FLAGS, cwd=cwd)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("switchback: validation loss"):
            break
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    checkpoint = shutil.copy(cwd / "runs" / "demo" / "checkpoint.pt", cwd / "copy.pt")
    return Interrupted(process.returncode, output, checkpoint, cwd)


def speed(row: list[str]) -> float:
    return float(row[3].replace(",", ""))


def test_table_compares_the_recipes(finished: Finished) -> None:
    linear = next(line.split() for line in finished.output.splitlines() if re.match(r"linear +\d", line))
    switchback = next(line.split() for line in finished.output.splitlines() if re.match(r"switchback +\d", line))
    linear_loss, switchback_loss = float(linear[1]), float(switchback[1])
    assert linear[2] == "-"
    assert float(switchback[2].rstrip("%")) == pytest.approx(100 * (switchback_loss / linear_loss - 1), abs=0.01)
    assert switchback[3:6] == [switchback[3], f"{speed(switchback) / speed(linear):.2f}", "×"]
    assert 0 < int(linear[-1].rstrip("%")) < 100
    for name, loss in (("linear", linear[1]), ("switchback", switchback[1])):
        assert f"{name}: validation loss {loss} after 60 steps" in finished.output


def test_recipes_take_turns(finished: Finished) -> None:
    lines = re.findall(r"^(\w+): validation loss [\d.]+ after (\d+) steps", finished.output, re.MULTILINE)
    assert lines == [(recipe, str(step)) for step in range(5, 61, 5) for recipe in ("linear", "switchback")]


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
    assert list(checkpoint["runs"]) == ["linear", "switchback"]
    linear, switchback = (run["step"] for run in checkpoint["runs"].values())
    assert 5 <= switchback < 60 and abs(linear - switchback) <= 5


def test_printed_command_resumes_to_the_same_losses_to_the_bit(interrupted: Interrupted, finished: Finished) -> None:
    command = shlex.split(interrupted.output.splitlines()[-1])
    process = start(*command, cwd=interrupted.cwd)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    out = interrupted.cwd / "runs" / "demo"
    resumed = json.loads((out / "results.json").read_text())
    assert not (out / "checkpoint.pt").exists()
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


@pytest.fixture
def left(interrupted: Interrupted, tmp_path: Path) -> Path:
    """A folder in which an interrupted run has left its checkpoint."""
    shutil.copy(interrupted.checkpoint, tmp_path / "checkpoint.pt")
    return tmp_path


def checkpoint_used(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[dict[str, Any] | None, str]:
    """Return the checkpoint from which the demo would go on, and what it says."""
    calls = []
    monkeypatch.setattr(train_gpt, "train_and_report", lambda *call: calls.append(call))
    result = CliRunner().invoke(train_gpt.app, arguments)
    assert result.exit_code == 0, result.output
    return calls[0][2], result.output


def test_without_a_terminal_a_checkpoint_that_is_there_is_continued(left: Path, monkeypatch) -> None:
    # The console's file is not the runner's.
    monkeypatch.setattr(train_gpt, "console", said := Console(file=io.StringIO()))
    checkpoint, _ = checkpoint_used(monkeypatch, "--out", str(left))
    assert checkpoint is not None and checkpoint["settings"]["preset"] == "tiny"
    assert "Going on from it; --fresh starts again." in said.file.getvalue().replace("\n", " ")


def test_fresh_ignores_the_checkpoint(left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint_used(monkeypatch, "--fresh", "--preset", "tiny", "--out", str(left))[0] is None


@pytest.mark.parametrize("answer", [True, False])
def test_on_a_terminal_the_demo_asks(answer: bool, left: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_gpt, "is_interactive", lambda: True)
    monkeypatch.setattr(train_gpt.typer, "confirm", lambda question, default: answer)
    arguments = ("--preset", "tiny", "--out", str(left))
    assert (checkpoint_used(monkeypatch, *arguments)[0] is not None) == answer


def test_a_checkpoint_that_does_not_fit_is_not_overwritten(left: Path) -> None:
    message = refused("--seed", "8", "--out", str(left))
    assert "has seed 7, not 8" in message and "--fresh ignores it" in message


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
