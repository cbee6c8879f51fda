"""The command `neurontune robustness`: a mask's levels while somebody prunes its safety neurons.

Knows arguments, files and terminals; the work is done by the modules it calls.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from tqdm import tqdm

from modulation.errors import DataError, LevelError

if TYPE_CHECKING:
    from modulation.levels import SafetyLevel
    from modulation.masks import Mask

COUNTS = "0,1,5,10,25%,50%,100%"
SHOWN = ("asr", "over_refusal", "benign_correct")


def robustness(
    data: Annotated[Path, typer.Option(help="Prompts, one JSON object a line (docs/demo-model.md).")],
    model: Annotated[str, typer.Option(help="'demo', a Hugging Face folder, or a hub name.")] = "demo",
    mask: Annotated[Path | None, typer.Option(help="Mask file; left out: the demo model's.")] = None,
    levels: Annotated[
        str, typer.Option(help="Level names or numbers, separated by commas.")
    ] = "off,security-critical",
    counts: Annotated[
        str, typer.Option(help="How many safety neurons to prune: numbers, or shares of the set (25%).")
    ] = COUNTS,
    num_random: Annotated[int, typer.Option(min=0, help="Random draws of as many neurons, as control.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the first random draw.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    json_out: Annotated[Path | None, typer.Option("--json", help="File to write the figures to.")] = None,
    html_out: Annotated[Path | None, typer.Option("--html", help="File to write the report to.")] = None,
) -> None:
    """Prune the top safety neurons, then answer prompts at several levels and judge the answers."""
    # Imported here, so that other commands start without torch.
    from modulation.demo import MASK_FILE, MODEL_DIR
    from modulation.evaluation import pruning
    from modulation.evaluation.data import read_records
    from modulation.evaluation.html.svg import require_matplotlib
    from modulation.evaluation.html_report import robustness_page
    from modulation.loading import load_model, load_tokenizer
    from modulation.masks import Mask
    from modulation.modulator import Modulator

    if mask is None and model != "demo":
        raise DataError(f"--mask is missing: model {model!r} has no shipped mask.")
    _check_outputs({"--json": json_out, "--html": html_out})
    if html_out is not None:
        require_matplotlib()
    records = read_records(data)
    loaded_mask = Mask.load(mask or MASK_FILE)
    chosen = _levels(loaded_mask, levels)
    numbers = pruning.read_counts(counts, len(loaded_mask.safety))
    rankings = {pruning.SAFETY: pruning.safety_ranking(loaded_mask)}
    for draw in range(seed, seed + num_random):
        rankings[f"random {draw}"] = pruning.random_ranking(loaded_mask, draw)
    pruning.check_counts(numbers, rankings)
    folder = str(MODEL_DIR) if model == "demo" else model
    tokenizer = load_tokenizer(folder)
    modulator = Modulator(load_model(folder, device="cpu", dtype="float32"), loaded_mask)
    passes = pruning.num_measured(len(chosen), numbers, len(rankings))
    with tqdm(total=passes * len(records), unit="prompt") as bar:
        points = pruning.pruned_metrics(
            modulator,
            tokenizer,
            records,
            chosen,
            numbers,
            rankings,
            max_new_tokens=max_new_tokens,
            on_answered=lambda number: bar.update(number),
        )
    for metric in SHOWN:
        if any(metric in point["figures"] for point in points):
            typer.echo(f"\n{metric}:\n\n{pruning.pruning_table(points, metric)}")
    run = {
        "model": model,
        "mask": loaded_mask.digest,
        "data": str(data),
        "safety set": f"{len(loaded_mask.safety)} neurons",
        "answers": f"greedy, float32, at most {max_new_tokens} tokens",
    }
    if json_out is not None:
        json_out.write_text(json.dumps({"run": run, "points": points}, indent=2) + "\n")
        typer.echo(f"\nWrote {json_out}.")
    if html_out is not None:
        html_out.write_text(robustness_page(points, run), encoding="utf-8")
        typer.echo(f"\nWrote {html_out}.")


def _check_outputs(outputs: dict[str, Path | None]) -> None:
    """Before anything slow is done: files that cannot be written are refused."""
    for flag, path in outputs.items():
        if path is not None and not path.parent.is_dir():
            raise DataError(f"{flag} {path}: the folder {path.parent} does not exist.")
        if path is not None and path.is_dir():
            raise DataError(f"{flag} {path} is a folder; a file is needed.")


def _levels(mask: "Mask", text: str) -> "list[SafetyLevel]":
    chosen = [mask.levels.parse(name.strip()) for name in text.split(",")]
    if len({level.name for level in chosen}) < len(chosen):
        raise LevelError(f"--levels {text!r} names a level twice.")
    return chosen
