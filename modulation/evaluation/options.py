"""The flags that `neurontune evaluate` and `neurontune robustness` have in common, each written once.

Knows names and help texts. Defaults stand with the commands.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from modulation.evaluation.attacks import ATTACKS

Kind = Literal["harmful", "benign", "borderline"]

DataFile = Annotated[Path, typer.Option("--data", help="Prompts: CSV or JSON lines (docs/evaluation.md).")]
MaskFile = Annotated[Path | None, typer.Option("--mask", help="Mask file; left out: the demo model's.")]
PromptKind = Annotated[
    Kind | None, typer.Option("--kind", help="What the prompts are, where two published files look the same.")
]
Attacks = Annotated[
    str,
    typer.Option(
        "--attacks", help=f"Families to wrap plain harmful prompts in: all, none, {', '.join(ATTACKS)}."
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]
JsonOut = Annotated[Path | None, typer.Option("--json", help="File to write the figures to.")]
HtmlOut = Annotated[Path | None, typer.Option("--html", help="File to write the report to, one page.")]
