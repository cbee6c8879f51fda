"""The command `neurontune levels`: from a tuned mask and prompts to a mask whose levels were chosen on a
measured curve.

Knows arguments, files and terminals; the work is done by the modules it calls.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from modulation.demo import DEMO
from modulation.errors import LevelError
from modulation.evaluation.options import Attacks, DataFile, JsonOut, PromptKind
from modulation.evaluation.prompts import Prompts, read_prompts
from modulation.flags import Device, Dtype, refuse_unwritable
from modulation.opening import open_model

if TYPE_CHECKING:
    from modulation.masks import Mask
    from modulation.opening import Opened
    from modulation.tuning.curve import Point
    from modulation.tuning.leveling import KeptPoints


def levels(
    data: DataFile,
    mask: Annotated[Path, typer.Option(help="Mask whose levels are to be chosen.")],
    out: Annotated[Path, typer.Option(help="Mask file to write.")],
    model: Annotated[str, typer.Option(help="'demo', a Hugging Face folder, or a hub name.")] = DEMO,
    kind: PromptKind = None,
    attacks: Attacks = "none",
    seed: Annotated[int, typer.Option(min=0, help="Of the wrappers that --attacks begins with.")] = 0,
    allow_less_safe: Annotated[
        bool, typer.Option("--allow-less-safe", help="Also write a level that is less safe than 'off'.")
    ] = False,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="The weights' type.")] = "auto",
    json_out: JsonOut = None,
) -> None:
    """Measure the safety-utility curve and choose levels on it. Goes on where it was interrupted."""
    from modulation.checkpoints import Checkpoint, checkpoint_beside
    from modulation.masks import Mask
    from modulation.tuning.leveling import KeptPoints, refuse_lacking, sweep_key

    refuse_unwritable({"--out": out, "--json": json_out})
    prompts = read_prompts(data, kind, attacks, seed)
    typer.echo(f"{data}: {prompts}")
    refuse_lacking(prompts.records)
    loaded = Mask.load(mask)
    opened = open_model(model, device, dtype)
    typer.echo(str(opened))
    key = sweep_key(loaded, prompts.records, opened.device.value, opened.dtype.value)
    checkpoint = Checkpoint(checkpoint_beside(out), key)
    points = _points(opened, loaded, prompts, KeptPoints(checkpoint))
    wrapped = "" if attacks == "none" else f", attacks {attacks} with seed {seed}"
    source = f"{data.name}: {prompts.told}{wrapped}"
    made = _with_levels(loaded, points, prompts, source, allow_less_safe)
    if json_out is not None:
        json_out.write_text(json.dumps(made.metadata.evaluation, indent=2) + "\n")
        typer.echo(f"Wrote {json_out}.")
    made.save(out)
    checkpoint.remove()
    typer.echo(f"Wrote {out}.")


def _points(opened: "Opened", mask: "Mask", prompts: Prompts, kept: "KeptPoints") -> "list[Point]":
    from modulation.modulator import Modulator
    from modulation.tuning.curve import grid
    from modulation.tuning.leveling import measured_points

    modulator = Modulator(opened.model, mask)
    num_prompts = len(prompts.records)
    total = len(grid(mask.levels.maximum)) * num_prompts
    with tqdm(total=total, initial=len(kept) * num_prompts, unit="answer") as bar:
        return measured_points(
            modulator,
            opened.tokenizer,
            mask,
            prompts.records,
            lambda number: bar.update(number),
            kept,
        )


def _with_levels(
    mask: "Mask", points: "Sequence[Point]", prompts: Prompts, source: str, allow_less_safe: bool
) -> "Mask":
    """The mask with its levels; the curve is printed even where they are refused."""
    from modulation.tuning.curve import RULE, choose
    from modulation.tuning.leveling import with_levels
    from modulation.tuning.summary import curve_table

    try:
        chosen = choose(points, allow_less_safe=allow_less_safe)
    except LevelError:
        typer.echo(f"\n{curve_table(points, {})}\n")
        raise
    typer.echo(f"\n{curve_table(points, chosen)}\n\n{RULE}\n")
    return with_levels(mask, points, prompts.records, source, allow_less_safe)
