"""Rates as a table for people.

Knows names and rates; knows nothing of where they come from.
"""

from collections.abc import Iterable, Mapping, Sequence

from modulation.evaluation.metrics import Rate

HEADINGS = ("metric", "rate", "count", "95 % interval")


def table(rows: Iterable[tuple[str, Rate | None]]) -> str:
    """A Markdown table, one row a rate; a rate of None makes a row that only names a figure."""
    cells = [HEADINGS, *(_cells(name, rate) for name, rate in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(HEADINGS))]
    lines = [_line(row, widths) for row in cells]
    ruler = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], ruler, *lines[1:]])


def answer_table(prompts: Sequence[str], columns: Mapping[str, Sequence[str]]) -> str:
    """A Markdown table of answers: one block of rows a prompt, one row a level."""
    lines = ["| prompt | level | answer |", "|---|---|---|"]
    for number, prompt in enumerate(prompts):
        for level, found in columns.items():
            shown = prompt if level == next(iter(columns)) else ""
            lines.append(f"| {shown} | `{level}` | {found[number]} |".replace("|  |", "| |"))
    return "\n".join(lines)


def percent(share: float) -> str:
    """A share as per cent with one decimal place."""
    return f"{100 * share:.1f} %"


def _cells(name: str, rate: Rate | None) -> tuple[str, str, str, str]:
    if rate is None:
        return name, "-", "-", "-"
    interval = f"{percent(rate['low'])} to {percent(rate['high'])}"
    return name, percent(rate["rate"]), f"{rate['count']}/{rate['total']}", interval


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    return "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
