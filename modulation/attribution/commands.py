"""The command `neurontune attribute`: from a model and a file of prompts to a scores file.

Knows arguments, files and terminals; the work is done by the modules it calls.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Never

import typer
from tqdm import tqdm

from modulation.demo import DEMO
from modulation.flags import Device, Dtype, refuse_unwritable
from modulation.opening import model_id, open_model

if TYPE_CHECKING:
    from modulation.attribution.accumulate import OnProgress


def attribute(
    data: Annotated[Path, typer.Option(help="Prompts, one JSON object a line (docs/attribution.md).")],
    model: Annotated[str, typer.Option(help="'demo', a Hugging Face folder, or a hub name.")] = DEMO,
    method: Annotated[
        str, typer.Option(help="attack_aware, contrast, contrastive_pairs, set_difference or random.")
    ] = "attack_aware",
    out: Annotated[Path, typer.Option(help="Scores file to write.")] = Path("scores.safetensors"),
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the method; repeatable.")
    ] = None,
    refusal: Annotated[
        str | None, typer.Option(help="How the model refuses; left out: as the demo model does.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="The weights' type.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts computed together.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of methods that draw numbers.")] = 0,
) -> None:
    """Score every neuron by how much it carries safety and utility. Goes on where it was interrupted."""
    # Imported here, so that other commands start without torch.
    from modulation.attribution.methods import parse_options
    from modulation.attribution.reading import examples_of
    from modulation.attribution.runs import Run, summary
    from modulation.attribution.runs import attribute as attribute_data
    from modulation.evaluation.data import read_records

    refuse_unwritable({"--out": out}, {"--data": data})
    options = parse_options(method, option or [], seed)
    records = read_records(data)
    opened = open_model(model, device, dtype)
    typer.echo(str(opened))
    examples = examples_of(records, opened, refusal, batch_size)
    run = Run(method, options, model_id(model), seed, batch_size)
    with tqdm(unit="prompt") as bar:
        made = attribute_data(opened.model, opened.tokenizer, examples, run, out, _shown_on(bar))
    typer.echo(f"\n{summary(made)}\n\nWrote {out}.")


def _shown_on(bar: "tqdm[Never]") -> "OnProgress":
    def show(name: str, done: int, total: int) -> None:
        if bar.total is None:  # what an interrupted run did counts as done, but not for the time left
            bar.total, bar.initial, bar.n = total, done, done
        bar.set_description(name, refresh=False)
        bar.update(done - bar.n)

    return show
