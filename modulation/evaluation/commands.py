"""The command `neurontune evaluate`: any file of prompts, at any levels of a mask.

Knows arguments, files and terminals; the work is done by the modules it calls.
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from modulation.errors import DataError, LevelError


def evaluate(
    data: Annotated[Path, typer.Option(help="Prompts, one JSON object a line (docs/demo-model.md).")],
    model: Annotated[str, typer.Option(help="'demo', a Hugging Face folder, or a hub name.")] = "demo",
    mask: Annotated[Path | None, typer.Option(help="Mask file; left out: the demo model's.")] = None,
    levels: Annotated[
        str, typer.Option(help="Level names or numbers, separated by commas; left out: all of the mask.")
    ] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    json_out: Annotated[Path | None, typer.Option("--json", help="File to write the figures to.")] = None,
) -> None:
    """Answer a file of prompts at several safety levels and judge the answers."""
    # Imported here, so that other commands start without torch.
    from modulation.demo import MASK_FILE, MODEL_DIR
    from modulation.evaluation.data import read_records
    from modulation.evaluation.levels import metrics_at
    from modulation.evaluation.report import table
    from modulation.loading import load_model, load_tokenizer
    from modulation.masks import Mask
    from modulation.modulator import Modulator

    if mask is None and model != "demo":
        raise DataError(f"--mask is missing: model {model!r} has no shipped mask.")
    if json_out is not None and not json_out.parent.is_dir():
        raise DataError(f"--json {json_out}: the folder {json_out.parent} does not exist.")
    if json_out is not None and json_out.is_dir():
        raise DataError(f"--json {json_out} is a folder; a file is needed.")
    records = read_records(data)
    loaded_mask = Mask.load(mask or MASK_FILE)
    chosen = (
        [loaded_mask.levels.parse(name.strip()) for name in levels.split(",")]
        if levels
        else [*loaded_mask.levels]
    )
    if len({level.name for level in chosen}) < len(chosen):
        raise LevelError(f"--levels {levels!r} names a level twice.")
    folder = str(MODEL_DIR) if model == "demo" else model
    tokenizer = load_tokenizer(folder)
    modulator = Modulator(load_model(folder, device="cpu", dtype="float32"), loaded_mask)
    with tqdm(total=len(records) * len(chosen), unit="prompt") as bar:
        metrics = metrics_at(
            modulator,
            tokenizer,
            records,
            [level.threshold for level in chosen],
            on_answered=lambda number: bar.update(number),
            max_new_tokens=max_new_tokens,
        )
    for level, found in zip(chosen, metrics, strict=True):
        threshold = level.threshold
        typer.echo(f"\n{level.name} ({threshold.num_safety}, {threshold.num_utility}):\n")
        typer.echo(table([(name, rate) for name, rate in found.items() if name != "asr_by_family"]))  # type: ignore[misc]
    if json_out is not None:
        figures = {level.name: found for level, found in zip(chosen, metrics, strict=True)}
        json_out.write_text(json.dumps({"levels": figures}, indent=2) + "\n")
        typer.echo(f"\nWrote {json_out}.")
