"""Tables as plain text."""

import math
import re
from collections.abc import Iterable, Sequence


def table(headers: Sequence[str], cells: Iterable[Sequence[object]]) -> str:
    """Return columns under their headers, two spaces apart, numbers to the right; a dash stands for None."""
    rows = [["–" if cell is None else str(cell) for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    numeric = [all(row[index][:1].isdigit() or row[index] in ("", "–") for row in rows) for index in range(len(widths))]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in (headers, *rows)
    ]
    return "\n".join(lines)


def grouped(rows: Iterable[Sequence[object]]) -> list[tuple[object, ...]]:
    """Return rows that differ in the numbers of a dotted name, their first cell, as one: "layers.0–31.up × 32".

    They stay apart if the ranges would cover other names too.
    """
    groups: dict[tuple[tuple[str, ...], tuple[object, ...]], list[tuple[str, list[int]]]] = {}
    for name, *others in rows:
        parts = re.split(r"(?<![^.])(\d+)(?![^.])", str(name))
        groups.setdefault((tuple(parts[::2]), tuple(others)), []).append((str(name), [*map(int, parts[1::2])]))
    result: list[tuple[object, ...]] = []
    for (texts, cells), members in groups.items():
        numbers = [{*column} for column in zip(*(found for _, found in members), strict=True)]
        if len(members) == 1 or math.prod(map(len, numbers)) != len(members):
            result += [(name, *cells) for name, _ in members]
        else:
            ranges = [*map(_ranges, numbers), f" × {len(members)}"]
            result.append(("".join(f"{text}{between}" for text, between in zip(texts, ranges, strict=True)), *cells))
    return result


def _ranges(numbers: set[int]) -> str:
    """Return numbers as ranges: "0–3,5"."""
    first = sorted(number for number in numbers if number - 1 not in numbers)
    last = sorted(number for number in numbers if number + 1 not in numbers)
    return ",".join(f"{a}–{b}" if a < b else f"{a}" for a, b in zip(first, last, strict=True))
