"""The table of docs/performance.md, made from the CSV files, so that page and figures can't drift apart."""

from pathlib import Path

from benchmarks.harness import RESULTS, ROOT, Row, is_measured, read_rows

PAGE = ROOT / "docs/performance.md"
BEGIN, END = "<!-- table: python -m benchmarks.plots -->", "<!-- end of the table -->"
MEASURED = ("what", "against", "setting", "ratio (lowest-highest)", "goal", "reached", "command")
MISSING = ("what", "against", "setting", "goal")


def all_rows(results: Path = RESULTS) -> list[Row]:
    """The rows of all files with the common columns; those of studies have others."""
    return [row for path in sorted(results.glob("*.csv")) for row in read_rows(path)]


def table(rows: list[Row]) -> str:
    """Markdown, a line a row: first what was measured, then what was not."""
    measured = [
        (
            *_names(row),
            f"{row['ratio']} ({row['lowest']}-{row['highest']})",
            _goal(row),
            row["reached"] or "-",
            f"`{row['command']}`",
        )
        for row in rows
        if is_measured(row)
    ]
    missing = [(*_names(row), _goal(row)) for row in rows if not is_measured(row)]
    return "\n\n".join((_lines(MEASURED, measured), "Not measured:", _lines(MISSING, missing)))


def _names(row: Row) -> tuple[object, ...]:
    return row["what"], row["against"], f"{row['setting']}{', GPU' if row['device'] == 'cuda' else ''}"


def _goal(row: Row) -> object:
    return row["goal"] or "-"


def _lines(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (header, ["---"] * len(header), *rows))


def with_table(text: str, rows: list[Row]) -> str:
    """The page with its table made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}"
