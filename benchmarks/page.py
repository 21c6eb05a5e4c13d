"""The table of docs/performance.md, made from the CSV files, so that page and figures can't drift apart."""

from pathlib import Path

from benchmarks.harness import RESULTS, ROOT, Row, is_measured, read_rows

PAGE = ROOT / "docs/performance.md"
BEGIN, END = "<!-- table: python -m benchmarks.plots -->", "<!-- end of the table -->"
HEADER = "| what | against | setting | ratio (lowest-highest) | goal | reached | command |"


def all_rows(results: Path = RESULTS) -> list[Row]:
    """The rows of all files with the common columns; those of studies have others."""
    return [row for path in sorted(results.glob("*.csv")) for row in read_rows(path)]


def table(rows: list[Row]) -> str:
    """Markdown: a line a row."""
    lines = [HEADER, "|---" * (HEADER.count("|") - 1) + "|"]
    for row in rows:
        ratio = f"{row['ratio']} ({row['lowest']}-{row['highest']})" if is_measured(row) else "not measured"
        command = f"`{row['command']}`" if row["command"] else ""
        setting = f"{row['setting']}{', GPU' if row['device'] == 'cuda' else ''}"
        cells = (row["what"], row["against"], setting, ratio, row["goal"] or "-", row["reached"] or "-", command)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def with_table(text: str, rows: list[Row]) -> str:
    """The page with its table made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.split(END)[1]}"
