"""Run the tests of the promises and make docs/reliability.md of what they came to.

    python tests/reliability.py run cpu                  # or interpreter, or, on a machine with a GPU, h200 or h100
    python tests/reliability.py run h200 --output tests/results/h200_two_gpus.json -k not_the_current
    python tests/reliability.py page

Every JSON in tests/results is a part of what its name begins with, a column of the page or another GPU in its head:
``h200.json``, ``h200_soak.json``. It has ``environment``, which says where and with what, and ``tests``: by name, how
many of its cases passed, failed or were skipped, what it promises (promises.py), and what else it counted.
"""

import argparse
import ast
import functools
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from promises import PROMISES, Promise

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tests" / "results"
PAGE = ROOT / "docs" / "reliability.md"
COLUMNS = {"cpu": "CPU", "interpreter": "interpreter", "h200": "H200"}
OTHER_GPUS = {"h100": "H100"}
ON_A_GPU = ["--device", "cuda"]
FLAGS = {"cpu": [], "interpreter": ["tests/kernels"], "h200": ON_A_GPU} | dict.fromkeys(OTHER_GPUS, ON_A_GPU)
COUNTED = {"examples": "examples that hypothesis drew", "steps": "random steps of the soak"}
OUTCOMES = ("passed", "failed", "skipped")
Test = dict[str, Any]


def run(column: str, output: Path, arguments: list[str]) -> int:
    """Run a column's tests, with pytest's further arguments, and write what they came to."""
    environment_of()  # or fail now
    variables = {**os.environ, "TRITON_INTERPRET": "1"} if column == "interpreter" else dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "promise and takes_device", f"--junitxml={report}"]
        code = subprocess.run([*command, *FLAGS[column], *arguments], cwd=ROOT, env=variables).returncode
        write(output, "cuda" if FLAGS[column] == ON_A_GPU else "cpu", tests_of(report.read_text()))
    return code


def write(output: Path, device: str, tests: dict[str, Test], **more: Any) -> None:
    """Write a result with its provenance."""
    content = {"environment": environment_of()(torch.device(device)), **more, "tests": dict(sorted(tests.items()))}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def environment_of() -> Callable[[torch.device], dict[str, Any]]:
    """The examples' function that says where and with what they ran."""
    sys.path.insert(0, str(ROOT / "examples"))
    from report import environment

    return environment


def tests_of(report: str) -> dict[str, Test]:
    """A JUnit report's test functions: their cases' outcomes and properties."""
    tests: dict[str, Test] = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        properties = [(each.get("name"), each.get("value")) for each in case.iter("property")]
        promises = [value for name, value in properties if name == "promise"]
        if not promises:
            continue
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '').partition('[')[0]}"
        test = tests.setdefault(name, dict.fromkeys(OUTCOMES, 0) | {"promises": []})
        found = {element.tag: element for element in case}
        outcome = "failed" if found.keys() & {"failure", "error"} else "skipped" if "skipped" in found else "passed"
        test[outcome] += 1
        if outcome == "skipped":
            test["reason"] = found["skipped"].get("message")
        test["promises"] = sorted({*test["promises"], *promises})
        for counted, value in properties:
            if counted in COUNTED:
                test[counted] = test.get(counted, 0) + int(value or 0)
    return tests


@functools.cache
def declared() -> dict[str, set[str]]:
    """The promises that tests say they show, read from their sources: the names of the tests' files by promise."""
    files: dict[str, set[str]] = {}
    for file in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            is_mark = isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "promise"
            for constant in ast.walk(node) if is_mark else ():
                if isinstance(constant, ast.Constant):
                    files.setdefault(constant.value, set()).add(str(file.relative_to(ROOT)))
    return files


# The page


@functools.cache
def results(column: str) -> dict[str, dict[str, Any]]:
    """A column's results by the name of their file."""
    files = sorted(RESULTS.glob(f"{column}*.json"))
    return {file.name: json.loads(file.read_text()) for file in files}


def merged(column: str) -> dict[str, Test]:
    """A column's tests, each as its newest run says that skipped no more of it than another."""
    tests: dict[str, Test] = {}
    for result in sorted(results(column).values(), key=lambda result: result["environment"]["date"]):
        for name, test in result["tests"].items():
            before = tests.get(name)
            if before is None or before["passed"] + before["failed"] <= test["passed"] + test["failed"]:
                tests[name] = test
    return tests


def cell(promise: Promise, column: str, tests: dict[str, Test]) -> str:
    why_not = getattr(promise, column)
    counts: Counter[str] = Counter()
    reasons = set()
    for test in tests.values():
        if promise.name in test["promises"]:
            counts.update({outcome: test[outcome] for outcome in OUTCOMES})
            reasons.add(test.get("reason"))
    if not any(counts.values()):
        if why_not is None:
            return "not run" if not results(column) else "**no test**"
        return f"not applicable: {why_not}"
    if not counts["passed"] and not counts["failed"]:
        return f"not run: {'; '.join(sorted(filter(None, reasons)))}"
    parts = [f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome]]
    return ("**" + ", ".join(parts) + "**") if counts["failed"] else ", ".join(parts)


def page() -> str:
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    columns = {column: merged(column) for column in COLUMNS}
    yield "# What is promised, and what its tests came to"
    yield ""
    yield (
        "Made by `python tests/reliability.py page` from [tests/promises.py](../tests/promises.py) and "
        "[tests/results](../tests/results), which `make reliability` renews. A number is of test cases: a "
        "test function times its dtypes, shapes, strategies. [determinism.md](determinism.md) says what bitwise means."
    )
    yield ""
    for column, title in (COLUMNS | OTHER_GPUS).items():
        yield f"- **{title}**: {_summary(column, columns.get(column) or merged(column))}"
    for group, promises in PROMISES.items():
        yield ""
        yield f"## {group}"
        yield ""
        yield "| promise | outcome | tests | " + " | ".join(COLUMNS.values()) + " |"
        yield "|---|---|---|" + "---|" * len(COLUMNS)
        for promise in promises:
            names = {
                name for tests in columns.values() for name, test in tests.items() if promise.name in test["promises"]
            }
            links = ", ".join(_link(name) for name in sorted(names)) or ", ".join(
                f"[{Path(file).name}](../{file})" for file in sorted(declared().get(promise.name, ()))
            )
            cells = [cell(promise, column, tests) for column, tests in columns.items()]
            yield "| " + " | ".join([promise.name.replace("|", "\\|"), promise.outcome, links, *cells]) + " |"


def _link(name: str) -> str:
    file, _, function = name.partition("[")[0].partition("::")
    return f"[{function}](../{file})"


def _summary(column: str, tests: dict[str, Test]) -> str:
    if not tests:
        return "not run"
    hostile = {promise.name for group in ("Hostile inputs", "Bad state", "Faults") for promise in PROMISES[group]}
    cases = sum(test["passed"] + test["failed"] for test in tests.values() if not hostile.isdisjoint(test["promises"]))
    numbers = [
        f"{sum(test['passed'] for test in tests.values()):,} cases passed",
        f"{sum(test['failed'] for test in tests.values()):,} failed",
        f"{cases:,} of them of hostile inputs, states and faults",
    ]
    for counted, what in COUNTED.items():
        total = sum(test.get(counted, 0) for test in tests.values())
        numbers += [f"{total:,} {what}"] if total else []
    wheres = []
    for file, result in results(column).items():
        where = result["environment"]
        versions = f"torch {where['torch']}, Triton {where['triton']}, Python {where['python']}"
        commit = (where["git_commit"] or "unknown")[:7] + (" with changes" if where["git_dirty"] else "")
        wheres.append(
            f"[{file}](../tests/results/{file}): {where['device']}, {versions}, {where['date'][:10]}, commit {commit}"
        )
    return ", ".join(numbers) + ". " + "; ".join(wheres) + "."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run the tests of a column; further arguments are for pytest")
    running.add_argument("column", choices=FLAGS)
    running.add_argument("--output", type=Path, help="by default tests/results/COLUMN.json")
    commands.add_parser("page", help="write docs/reliability.md")
    flags, arguments = parser.parse_known_args()
    if flags.command == "run":
        return run(flags.column, flags.output or RESULTS / f"{flags.column}.json", arguments)
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
