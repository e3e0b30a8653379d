"""compute-sanitizer's four tools over every kernel: no reports, and one of each fault that was planted.

Only with ``--sanitizer``: it takes minutes. They run side by side, after runs without them have compiled the kernels.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

PARTS = 3
PROGRAM = [sys.executable, str(Path(__file__).with_name("sanitized.py"))]
SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]
PLANTED = {"memcheck": "out_of_bounds", "racecheck": "race", "initcheck": "uninitialised"}
FLAGS = ["--target-processes", "application-only", "--print-limit", "20"]
FLAGS_OF = {"memcheck": ["--report-api-errors", "no"]}

pytestmark = pytest.mark.skipif(SANITIZER is None, reason="there is no compute-sanitizer")


def watched(tool, *arguments):
    """What a tool says of a run of the program: how many reports, and all of it."""
    command = [SANITIZER, "--tool", tool, *FLAGS, *FLAGS_OF.get(tool, []), *PROGRAM, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=540)
    found = re.findall(r"(?:ERROR SUMMARY: |RACECHECK SUMMARY: )(\d+) (?:errors?|hazards?)", done.stdout)
    assert found, done.stdout
    return sum(map(int, found)), done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[tuple[str, str], Future]:
    """Every run, by tool and part or plant."""
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(TOOLS) * (PARTS + 1)) as pool:
        for name, value in variables.items():
            patch.setenv(name, value)
        workers = len(os.sched_getaffinity(0))
        list(pool.map(lambda part: compile_kernels(part, workers), range(workers)))
        runs = {}
        for tool in TOOLS:
            for part in range(PARTS):
                runs[tool, str(part)] = pool.submit(watched, tool, "--part", str(part), "--of", str(PARTS))
        for tool, plant in PLANTED.items():
            runs[tool, plant] = pool.submit(watched, tool, "--plant", plant)
        yield runs


def compile_kernels(part, parts):
    done = subprocess.run([*PROGRAM, "--part", str(part), "--of", str(parts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(
    "tool",
    [
        pytest.param("memcheck", marks=pytest.mark.promise("memcheck")),
        pytest.param("racecheck", marks=pytest.mark.promise("racecheck")),
        pytest.param("initcheck", marks=pytest.mark.promise("initcheck")),
        pytest.param("synccheck", marks=pytest.mark.promise("synccheck")),
    ],
)
def test_nothing_is_reported(tool, part, runs):
    reports, said = runs[tool, str(part)].result()
    assert "calls are right" in said, said
    assert reports == 0, said


@pytest.mark.parametrize(
    "tool",
    [
        pytest.param("memcheck", marks=pytest.mark.promise("memcheck")),
        pytest.param("racecheck", marks=pytest.mark.promise("racecheck")),
        pytest.param("initcheck", marks=pytest.mark.promise("initcheck")),
    ],
)
def test_a_planted_fault_is_reported(tool, runs):
    reports, said = runs[tool, PLANTED[tool]].result()
    assert reports > 0, said
