"""Write results as JSON with one record per line, so that a file stays short and its diffs are readable."""

import json
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def provenance(device: str) -> dict[str, Any]:
    """Return when, where and with which versions a result was measured."""
    query = "nvidia-smi --id=0 --query-gpu=driver_version --format=csv,noheader"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(),
        "driver": None if device == "cpu" else subprocess.getoutput(query),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def dumps(document: dict[str, Any]) -> str:
    """Return a document as JSON: one line per key, and one line per item of a list or dict below it."""
    return "{\n" + ",\n".join(f"{_dump(key)}: {_items(value)}" for key, value in document.items()) + "\n}\n"


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a document to a file. A run that is killed meanwhile leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(dumps(document), encoding="utf-8")
    partial.replace(path)


def _items(value: Any) -> str:
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(f" {_dump(item)}" for item in value) + "\n]"
    if isinstance(value, dict) and any(isinstance(item, dict) for item in value.values()):
        return "{\n" + ",\n".join(f" {_dump(key)}: {_dump(item)}" for key, item in value.items()) + "\n}"
    return _dump(value)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
