"""Tables for a terminal of 100 columns."""

from collections.abc import Sequence

WIDTH = 100
Cells = Sequence[str]


def table(header: Cells, rows: Sequence[Cells], *, left: int = 1) -> str:
    """A table with columns two spaces apart, without trailing spaces.

    Args:
      header: the name of each column; "" for none.
      rows: one cell per column; or the `left` cells and one text for all other columns, such as
        a reason.
      left: number of columns aligned left; the others are aligned right.
    """
    full = [row for row in rows if len(row) == len(header)]
    widths = [max(len(row[i]) for row in (header, *full)) for i in range(len(header))]
    for row in rows:
        for i in range(min(left, len(row))):
            widths[i] = max(widths[i], len(row[i]))
    return "\n".join(_line(row, widths, left) for row in (header, *rows))


def _line(row: Cells, widths: list[int], left: int) -> str:
    if len(row) < len(widths):  # the last cell spans the other columns
        row = [*row[:left], row[-1]]
        cells = [cell.ljust(width) for cell, width in zip(row[:left], widths, strict=False)]
        start = sum(widths[:left]) + 2 * left
        return _cut("  ".join([*cells, row[-1]]), start)
    cells = [
        cell.ljust(width) if i < left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _cut(line: str, start: int) -> str:
    """Wraps a too long line between words; its further lines start at column `start`."""
    lines = []
    while len(line) > WIDTH:
        space = line.rfind(" ", start + 1, WIDTH)
        if space < 0:
            break
        lines.append(line[:space].rstrip())
        line = " " * start + line[space + 1 :]
    return "\n".join([*lines, line.rstrip()])


def figure(value: float) -> str:
    """Three significant digits: "0.123", "1.23", "12.3", "1,234"."""
    if value == 0:
        return "0"
    size = abs(value)
    decimals = 0 if size >= 99.95 else 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return f"{value:,.{decimals}f}"


def amount(value: float, unit: str) -> str:
    """In mega, giga or tera units: "42.9 GB"."""
    for size, letter in ((1e12, "T"), (1e9, "G")):
        if value >= size:
            return f"{figure(value / size)} {letter}{unit}"
    return f"{figure(value / 1e6)} M{unit}"


def percent(share: float) -> str:
    """ "12.3 %" """
    return f"{share * 100:,.1f} %"
