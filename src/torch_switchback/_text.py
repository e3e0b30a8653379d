"""Tables as plain text."""

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
