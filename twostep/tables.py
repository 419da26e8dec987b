"""Tables as text: Markdown for pages, aligned Markdown that reads well as it stands, and columns for a terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

Line = Sequence[str]


def markdown(head: Line, rows: Iterable[Line], *, aligned: bool = False) -> str:
    lines = [head, *rows]
    widths = [max(map(len, column)) if aligned else 3 for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    cells = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells if aligned else lines))


def columns(rows: Sequence[Line], right: Collection[int] = ()) -> str:
    """Rows may end early; `right` are the columns whose cells stand at their right."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = []
    for row in rows:
        cells = [cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
