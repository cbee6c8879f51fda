"""The commands `neurontune export lora` and `neurontune export checkpoint`.

Knows arguments and what is printed; the work is done by the modules it calls.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from modulation.demo import DEMO
from modulation.errors import ExportError
from modulation.flags import Dtype
from modulation.levels import SafetyLevel
from modulation.opening import model_id, open_mask

if TYPE_CHECKING:
    from modulation.export.source import Source
    from modulation.masks import Mask

app = typer.Typer(
    name="export",
    help="Write levels for engines that know nothing of neurons.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

MaskFile = Annotated[
    Path | None, typer.Option(help="Mask file. Default: the demo model's own; required for any other model.")
]
Model = Annotated[str, typer.Option(help="'demo', a Hugging Face folder, or a hub name.")]
Allowed = Annotated[
    bool,
    typer.Option(
        "--allow-less-safe-levels",
        help="Also export from a mask that records a level as less safe than its name.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace folders that an earlier export has written.")]


@app.command()
def lora(
    out: Annotated[Path, typer.Option(help="Folder for the adapters, one folder each: NAME-LEVEL.")],
    mask: MaskFile = None,
    model: Model = DEMO,
    level: Annotated[
        list[str] | None,
        typer.Option(help="A level's name or number; may be repeated. Default: every named level but 'off'."),
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(help="A level as two numbers, safety and utility neurons: 12,30; may be repeated."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What adapters are named after. Default: the last part of --model.")
    ] = None,
    padded: Annotated[
        bool, typer.Option("--padded", help="One rank for every layer, filled up with zeros.")
    ] = False,
    dtype: Annotated[
        Dtype, typer.Option(help="The adapters' type; auto: float32, which loses nothing.")
    ] = "auto",
    allow_less_safe_levels: Allowed = False,
    force: Force = False,
) -> None:
    """Write levels as LoRA adapters in PEFT's format, one folder each."""
    from modulation.export.folders import refuse_existing

    loaded = open_mask(model, mask)
    levels = _allowed(loaded, level or (), threshold or (), allow_less_safe_levels)
    base = _base_name(model, name)
    folders = [out / f"{base}-{each.name}" for each in levels]
    for folder in folders:
        refuse_existing(folder, force=force)
    source = _opened(model, loaded)
    kept_as = "float32" if dtype == "auto" else dtype
    ranks = [
        _write_adapter(source, loaded, each, folder, model_id(model), kept_as, padded)
        for each, folder in zip(levels, folders, strict=True)
    ]
    typer.echo(f"\nWith vLLM:\n  {_vllm_command(model, base, folders, max(ranks))}")


@app.command()
def checkpoint(
    out: Annotated[Path, typer.Option(help="Folder to write the model into.")],
    mask: MaskFile = None,
    model: Model = DEMO,
    level: Annotated[str | None, typer.Option(help="The level's name or number.")] = None,
    threshold: Annotated[
        str | None, typer.Option(help="Instead: two numbers, safety and utility neurons: 12,30.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="The weights' type; auto: as the model's are stored.")
    ] = "auto",
    allow_less_safe_levels: Allowed = False,
    force: Force = False,
) -> None:
    """Write the model as a plain Hugging Face folder with one level baked in."""
    from modulation.export import checkpoint as format_
    from modulation.export.card import card
    from modulation.export.folders import CARD, refuse_existing, written_whole
    from modulation.export.source import active_neurons

    if (level is None) == (threshold is None):
        raise ExportError("A checkpoint has one level in it: give either --level or --threshold.")
    loaded = open_mask(model, mask)
    (chosen,) = _allowed(
        loaded, [level] if level else [], [threshold] if threshold else [], allow_less_safe_levels
    )
    refuse_existing(out, force=force)
    source = _opened(model, loaded)
    kept_as = source.dtype if dtype == "auto" else dtype
    format_.bake(source, active_neurons(source, loaded, chosen.threshold), kept_as)
    with written_whole(out) as folder:
        format_.save(source, folder)
        (folder / CARD).write_text(
            card(
                loaded,
                chosen,
                model_id(model),
                f"The whole model with the level's factors multiplied into its weights, {kept_as}.",
                "Load it as any other model. It cannot be served with the mask, which refuses these weights: "
                "the factors would count twice.",
            )
        )
    typer.echo(f"Wrote {out}: {_described(chosen)}, {kept_as}.")


def _allowed(
    mask: "Mask", values: Sequence[str], thresholds: Sequence[str], allow_less_safe: bool
) -> list[SafetyLevel]:
    from modulation.export.choice import chosen_levels, refuse_less_safe_points
    from modulation.recorded import refuse_less_safe

    levels = chosen_levels(mask, values, thresholds)
    if not allow_less_safe:
        refuse_less_safe(mask)
        refuse_less_safe_points(mask, levels)
    return levels


def _base_name(model: str, name: str | None) -> str:
    base = (model if model == DEMO else Path(model_id(model)).name) if name is None else name
    if not _NAME.fullmatch(base):
        raise ExportError(
            f"Adapters cannot be named after {base!r}: letters, digits, '.', '_' and '-' are accepted. "
            "Choose with --name."
        )
    return base


def _opened(model: str, mask: "Mask") -> "Source":
    from modulation.export.source import open_source

    return open_source(model, mask)


def _write_adapter(
    source: "Source",
    mask: "Mask",
    level: SafetyLevel,
    folder: Path,
    base: str,
    dtype: str,
    padded: bool,
) -> int:
    """Write one adapter and say so; its rank."""
    from modulation.export.card import card
    from modulation.export.folders import CARD, written_whole
    from modulation.export.lora import lora_adapter, padded_rank
    from modulation.export.source import DTYPES, active_neurons

    active = active_neurons(source, mask, level.threshold)
    adapter = lora_adapter(source.sites, active, DTYPES[dtype], base, padded=padded)
    kind = (
        f"A LoRA adapter in PEFT's format, {dtype}: one rank per active neuron, "
        + (f"filled up to {adapter.rank} in every layer" if padded else f"at most {adapter.rank} in a layer")
        + ", scaling 1."
    )
    use = (
        f"`vllm serve {base} --enable-lora --max-lora-rank {padded_rank(adapter.rank)} "
        f"--lora-modules {folder.name}=FOLDER`, or `PeftModel.from_pretrained(model, FOLDER)`. Without the "
        "adapter, or at another strength than 1, it is another level. Do not use it beside the mask: the "
        "factors would count twice."
    )
    with written_whole(folder) as partial:
        adapter.save(partial)
        (partial / CARD).write_text(card(mask, level, base, kind, use))
    typer.echo(f"Wrote {folder}: {_described(level)}, rank {adapter.rank}, {dtype}.")
    return adapter.rank


def _described(level: SafetyLevel) -> str:
    return f"{level.name} ({level.threshold.num_safety}, {level.threshold.num_utility})"


def _vllm_command(model: str, base: str, folders: Sequence[Path], rank: int) -> str:
    from modulation.demo import MODEL_DIR
    from modulation.export.lora import VLLM_RANKS, padded_rank

    if rank > VLLM_RANKS[-1]:
        return f"not possible, its ranks end at {VLLM_RANKS[-1]}: take neurontune export checkpoint."
    modules = " ".join(f"{folder.name}={folder}" for folder in folders)
    # One more than there are: on CPUs vLLM 0.32 gives requests without an adapter what is in the last place.
    served = MODEL_DIR if model == DEMO else model
    return (
        f"vllm serve {served} --served-model-name {base} --enable-lora "
        f"--max-lora-rank {padded_rank(rank)} --max-loras {len(folders) + 1} --lora-modules {modules}"
    )
