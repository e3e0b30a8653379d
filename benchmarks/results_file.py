"""Read and write results files: JSON with one record per line, for short files and diffs.

    python benchmarks/results_file.py runs/demo/results.json benchmarks/results/h200/demo/results.json

A file has ``runs``, which say when, where and with which versions something was measured, and
``results``. Each run lists its ``cases``: of each shape, model or recipe the last run counts. The
command above copies the results of an example and keeps 100 points of each loss curve.
"""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]
CASE_KEYS = ("label", "model", "matmul", "recipe", "shape")  # the first that a record has names its case
DIGITS = 6  # significant ones
POINTS = 100


def provenance(device: str) -> Record:
    """Return when, where and with which versions a result is measured.

    The commit is ``$GIT_COMMIT``, for copies without a history, or that of this checkout.
    """
    is_cuda = device == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if is_cuda else cpu_name(),
        "driver": output("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader")
        if is_cuda
        else None,
        "torch": str(torch.__version__),
        "triton": installed("triton"),
        "torchao": installed("torchao"),
        "python": platform.python_version(),
        "commit": os.environ.get("GIT_COMMIT") or output("git", "rev-parse", "HEAD"),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def output(*command: str) -> str | None:
    """Return what a command prints in this folder, or None if it fails."""
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL, cwd=Path(__file__).parent).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def installed(distribution: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def folder(run: Record) -> str:
    """Return the name of the folder under results/ for the device of a run, such as h200."""
    return "cpu" if run["driver"] is None else run["device"].lower().removeprefix("nvidia ").split()[0]


def case_of(record: Record) -> Any:
    """Return the label, model, matmul, recipe or shape that a record belongs to."""
    found = next((record[key] for key in CASE_KEYS if key in record), None)
    return list(found) if isinstance(found, tuple) else found


def cases_of(records: Iterable[Record]) -> list[Any]:
    """Return the distinct cases of some records, in their order."""
    cases: list[Any] = []
    for record in records:
        if case_of(record) not in cases:
            cases.append(case_of(record))
    return cases


def save(path: Path, run: Record, results: list[Record]) -> None:
    """Write the results of a run. Keep the cases of the file that the run did not measure."""
    old = load(path) if path.exists() else {"runs": [], "results": []}
    measured = cases_of(results)
    earlier = [one | {"cases": [case for case in one["cases"] if case not in measured]} for one in old["runs"]]
    runs = [*(one for one in earlier if one["cases"]), {"cases": measured} | run]
    write(path, {"runs": runs, "results": [one for one in old["results"] if case_of(one) not in measured] + results})


def load(path: Path) -> Record:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, document: Record) -> None:
    """Write a document to a file. A script that is killed meanwhile leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(dumps(document), encoding="utf-8")
    partial.replace(path)


def dumps(document: Record) -> str:
    """Return a document as JSON with one line per key, and one line per record of a list."""
    return "{\n" + ",\n".join(f"{_line(key)}: {_lines(value)}" for key, value in document.items()) + "\n}\n"


def _lines(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(f" {_line(item)}" for item in value) + "\n]"
    return _line(value)


def _line(value: Any) -> str:
    return json.dumps(_short(value), ensure_ascii=False)


def _short(value: Any) -> Any:
    """Round floats to DIGITS significant digits, and drop what is None from a record."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def from_example(document: Record) -> Record:
    """Return the results of an example in this format, with POINTS points of each loss curve."""
    source = document.get("provenance") or document["results"][0]["environment"]
    keys = ("date", "device", "driver", "torch", "triton", "python", "processes", "reshard_after_forward")
    run = {key: source.get(key) for key in keys} | {"commit": source["git_commit"]}
    run["driver"] = run["driver"] and run["driver"].splitlines()[0]  # one line per GPU
    results = []
    for record in document["results"]:
        losses = record["curve"]["train_losses"]
        curve = record["curve"] | {"train_losses": losses[:: -(-len(losses) // POINTS)], "step_seconds": None}
        results.append(record | {"environment": None, "curve": curve})
    shared = {key: document[key] for key in ("settings", "preset", "corpus") if key in document}
    return {"runs": [run]} | shared | {"results": results}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Copy the results of an example in the compact format.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    write(arguments.target, from_example(load(arguments.source)))
