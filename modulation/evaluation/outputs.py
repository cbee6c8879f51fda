"""The two files that `neurontune evaluate` and `neurontune robustness` end with: figures and a page.

Knows paths and what the page needs. Knows nothing of what is in them.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from modulation.flags import refuse_unwritable


def refuse_outputs(
    json_out: Path | None,
    html_out: Path | None,
    reads: Mapping[str, Path | None],
    more: Mapping[str, Path | None],
) -> None:
    """Raise DataError for files that cannot be written, `more` among them, or that are read; and
    NeuronTuneError for a page without what draws it."""
    refuse_unwritable({"--json": json_out, "--html": html_out, **more}, reads)
    if html_out is not None:
        from modulation.evaluation.html.svg import require_matplotlib

        require_matplotlib()


def write_outputs(
    json_out: Path | None, result: Mapping[str, Any], html_out: Path | None, page: Callable[[], str]
) -> None:
    """Write those that were asked for, and say so."""
    if json_out is not None:
        json_out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        typer.echo(f"\nWrote {json_out}.")
    if html_out is not None:
        html_out.write_text(page(), encoding="utf-8")
        typer.echo(f"\nWrote {html_out}.")
