"""compute-sanitizer's four tools over every kernel: no reports, and one of each fault that was planted.

Only with ``--sanitizer``: it takes minutes. They run side by side, after runs without them have compiled the kernels.

Racecheck takes Triton's own hand-over to the warps of a warp-specialized kernel for a race: the warps read there what
they are to run, which other warps have written. Barriers of the whole block lie between every such write and read
(``barrier.sync 1`` in the kernel's PTX), but not at one place for all warps. No line of ours touches that memory.
"""

import inspect
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from torch_switchback.kernels import int8_matmul_warp_specialized

PARTS = 3
PROGRAM = [sys.executable, str(Path(__file__).with_name("sanitized.py"))]
SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]
PLANTED = {"memcheck": "out_of_bounds", "racecheck": "race", "initcheck": "uninitialized"}
FLAGS = ["--target-processes", "application-only", "--print-limit", "20"]
FLAGS_OF = {"memcheck": ["--report-api-errors", "no"]}

pytestmark = pytest.mark.skipif(SANITIZER is None, reason="there is no compute-sanitizer")


def watched(tool, *arguments):
    """Run the program under a tool, and return how many reports it makes, and its output."""
    command = [SANITIZER, "--tool", tool, *FLAGS, *FLAGS_OF.get(tool, []), *PROGRAM, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=540)
    found = re.findall(r"(?:ERROR SUMMARY: |RACECHECK SUMMARY: )(\d+) (?:errors?|hazards?)", done.stdout)
    assert found, done.stdout
    return sum(map(int, found)) - hand_overs(done.stdout), done.stdout


def hand_overs(said):
    """Count racecheck's reports of Triton's hand-over to the warps of a warp-specialized kernel."""
    kernel = int8_matmul_warp_specialized.int8_matmul_warp_specialized_kernel
    lines, first = inspect.getsourcelines(kernel.fn)
    file = Path(inspect.getsourcefile(kernel.fn)).name
    of_triton = {
        f"{file}:{first + number}"
        for number, line in enumerate(lines)
        if line.startswith("def ") or line.strip() == "gl.warp_specialize("
    }
    assert len(of_triton) == 2
    reports = said.split("Race reported between")[1:]
    return sum(set(re.findall(r" access at \S+(?: in (\S+))?", report)) <= of_triton for report in reports)


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
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_nothing_is_reported(tool, part, runs):
    reports, said = runs[tool, str(part)].result()
    assert "calls are right" in said, said
    assert reports == 0, said


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_a_planted_fault_is_reported(tool, runs):
    reports, said = runs[tool, PLANTED[tool]].result()
    assert reports > 0, said
