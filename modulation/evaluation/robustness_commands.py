"""The command `neurontune robustness`: a mask's levels while somebody prunes its safety neurons.

Knows arguments, files and terminals; the work is done by the modules it calls.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from modulation.demo import DEMO
from modulation.evaluation.judges import RULE
from modulation.evaluation.options import (
    Attacks,
    DataFile,
    HtmlOut,
    JsonOut,
    MaskFile,
    MaxNewTokens,
    PromptKind,
)
from modulation.evaluation.outputs import refuse_outputs, write_outputs
from modulation.evaluation.prompts import read_prompts
from modulation.evaluation.provenance import dated, provenance
from modulation.evaluation.run import Evaluation
from modulation.evaluation.sources import in_process
from modulation.flags import Device, Dtype, command_line, parse_levels
from modulation.opening import open_mask

if TYPE_CHECKING:
    from modulation.evaluation.rankings import Pruning
    from modulation.evaluation.robustness import PrunedFigures
    from modulation.masks import Mask

COUNTS = "0,1,5,10,25%,50%,100%"
SHOWN = ("asr", "refusal_plain", "over_refusal", "benign_correct")


def robustness(
    ctx: typer.Context,
    data: DataFile,
    model: Annotated[str, typer.Option(help="'demo', a Hugging Face folder, or a hub name.")] = DEMO,
    mask: MaskFile = None,
    levels: Annotated[
        str, typer.Option(help="Level names or numbers, separated by commas.")
    ] = "off,security-critical",
    kind: PromptKind = None,
    attacks: Attacks = "none",
    counts: Annotated[
        str, typer.Option(help="How many safety neurons to prune: numbers, or shares of the set (25%).")
    ] = COUNTS,
    scores: Annotated[
        Path | None, typer.Option(help="Scores file, to prune beyond the safety set in its order.")
    ] = None,
    num_random: Annotated[int, typer.Option(min=0, help="Random draws of as many neurons, as control.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the wrappers, and of the first random draw.")] = 0,
    max_new_tokens: MaxNewTokens = 64,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="What its weights are kept as.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered together.")] = 64,
    json_out: JsonOut = None,
    html_out: HtmlOut = None,
) -> None:
    """Prune the top safety neurons, then answer prompts at several levels and judge the answers."""
    reads = {"--data": data, "--mask": mask, "--scores": scores}
    refuse_outputs(json_out, html_out, reads, {})
    names = parse_levels(levels)
    prompts = read_prompts(data, kind, attacks, seed)
    typer.echo(f"{data}: {prompts}")
    loaded_mask = open_mask(model, mask)
    prunings = _prunings(loaded_mask, counts, scores, num_random, seed)
    source, loaded = in_process(
        model,
        loaded_mask,
        names,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    run = provenance(data, prompts, source, RULE, command_line(ctx))
    run["safety set"] = f"{len(loaded_mask.safety)} neurons"
    from modulation.evaluation.html_report import robustness_page
    from modulation.evaluation.robustness import num_passes, pruned_figures

    total = num_passes(prunings) * len(source.titles) * len(prompts.records)
    with tqdm(total=total, unit="answer", disable=None) as bar:
        evaluation = Evaluation(
            prompts.records, source.answer_at, measures=source.measures, on_done=bar.update
        )
        points = pruned_figures(evaluation, list(source.titles), loaded, prunings)
    _show(points)
    result = {"run": run, "points": points}
    write_outputs(json_out, result, html_out, lambda: robustness_page(points, dated(run)))


def _prunings(mask: "Mask", counts: str, scores: Path | None, num_random: int, seed: int) -> "list[Pruning]":
    from modulation.attribution.scores import ScoresFile
    from modulation.evaluation.rankings import random_pruning, read_counts, safety_pruning

    ranked_by = None if scores is None else ScoresFile.load(scores)
    attack = safety_pruning(mask, read_counts(counts, len(mask.safety)), ranked_by)
    return [attack, *(random_pruning(mask, attack, draw) for draw in range(seed, seed + num_random))]


def _show(points: "Sequence[PrunedFigures]") -> None:
    from modulation.evaluation.robustness import pruning_table

    for metric in SHOWN:
        if any(metric in point["figures"] for point in points):
            typer.echo(f"\n{metric}:\n\n{pruning_table(points, metric)}")
