"""Results of benchmarks as several runs left them."""

import json
from pathlib import Path
from typing import Any

from measure import Record


def collect(folder: Path) -> dict[str, Record]:
    """The documents of a folder, by script.

    A run with --only has a file of its own, as in bench_linear_vit.json. Of every shape or model the newest run counts
    that measured any of it: rows of one run stay together.

    Returns:
        By script its newest document, with the "results" and "limits" of all that count, and in "runs" the provenance
        of each of these by its file's name.
    """
    files = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
    files = {name: document for name, document in files.items() if "provenance" in document}
    by_script: dict[str, list[str]] = {}
    for name in sorted(files, key=lambda name: files[name]["provenance"]["date"]):
        by_script.setdefault(Path(files[name]["provenance"]["script"]).stem, []).append(name)
    return {script: _merged({name: files[name] for name in names}) for script, names in by_script.items()}


def _merged(documents: dict[str, Record]) -> Record:
    """One document of those of a script's runs, the oldest first."""
    *_, newest = documents.values()
    if len(documents) == 1:
        return newest | {"runs": {name: newest["provenance"] for name in documents}}
    source = {
        _case(record): name
        for name, document in documents.items()
        for record in document["results"]
        if record["median_ms"] is not None
    }
    merged = {
        field: [record for case, name in source.items() for record in documents[name][field] if _case(record) == case]
        for field in ("results", "limits")
        if field in newest
    }
    return newest | merged | {"runs": {name: documents[name]["provenance"] for name in source.values()}}


def _case(record: Record) -> Any:
    """What a record is of: a model, or a shape."""
    return record.get("model") or tuple(record["shape"])
