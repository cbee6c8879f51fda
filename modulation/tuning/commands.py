"""The command `neurontune tune`: from scores and prompts to a mask with learned factors, or from a tuned
mask and a few prompts of a new attack family to an adapted one.

Knows arguments, files and terminals; the work is done by the modules it calls.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Never

import typer
from tqdm import tqdm

from modulation.demo import DEMO
from modulation.errors import DataError
from modulation.flags import Device, Dtype, refuse_unwritable
from modulation.opening import model_id, open_model
from modulation.tuning.flags import refuse_misfits
from modulation.tuning.settings import (
    ADAPTATION_BUDGET,
    ADAPTATION_MARGIN,
    ADAPTATION_OPTIONS,
    ADAPTATION_RATE,
    ADAPTATION_STEPS,
    TuningSettings,
)

if TYPE_CHECKING:
    from modulation.attribution.scores import ScoresFile
    from modulation.evaluation.data import Record
    from modulation.levels import Threshold
    from modulation.masks import Mask
    from modulation.opening import Opened
    from modulation.tuning.meta import OnStep
    from modulation.tuning.runs import Tuned

SHARE: Final = 0.0198


@dataclass(frozen=True)
class _Request:
    """What both forms of the command are told."""

    data: Path
    out: Path
    model: str
    option: list[str]
    refusal: str | None
    seed: int
    device: Device
    dtype: Dtype


def tune(
    data: Annotated[Path, typer.Option(help="Prompts, one JSON object a line (docs/tuning.md).")],
    out: Annotated[Path, typer.Option(help="Mask file to write.")],
    scores: Annotated[
        Path | None, typer.Option(help="Scores file: which neurons (`neurontune attribute`).")
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Prompts to validate on; left out: some of --data are kept aside.")
    ] = None,
    validation_family: Annotated[
        list[str] | None,
        typer.Option(help="Attack family of --data to keep aside; repeatable; left out: the last one."),
    ] = None,
    model: Annotated[str, typer.Option(help="'demo', a Hugging Face folder, or a hub name.")] = DEMO,
    share: Annotated[
        float | None,
        typer.Option(help=f"Share of all neurons, half safety and half utility; left out: {SHARE}."),
    ] = None,
    num_safety: Annotated[
        int | None, typer.Option(min=1, help="Safety neurons; with --num-utility, in place of --share.")
    ] = None,
    num_utility: Annotated[int | None, typer.Option(min=0, help="Utility neurons.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of tuning; repeatable.")
    ] = None,
    refusal: Annotated[
        str | None, typer.Option(help="How the model refuses; left out: as the demo model does.")
    ] = None,
    adapt: Annotated[
        bool, typer.Option("--adapt", help="Adapt a tuned mask to a few prompts of a new attack family.")
    ] = False,
    mask: Annotated[Path | None, typer.Option(help="With --adapt: the mask to adapt.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help=f"With --adapt: steps; left out: {ADAPTATION_STEPS}.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help=f"With --adapt: a step's rate; left out: {ADAPTATION_RATE}.")
    ] = None,
    refusal_budget: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="With --adapt: by how much the mean probability of refusing a borderline prompt may rise; "
            f"left out: {ADAPTATION_BUDGET}.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the prompts' order and of their thresholds.")] = 0,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="The weights' type.")] = "auto",
) -> None:
    """Learn the factors of the top neurons. Goes on where it was interrupted."""
    refuse_unwritable({"--out": out})
    request = _Request(data, out, model, option or [], refusal, seed, device, dtype)
    learning = {
        "--scores": scores,
        "--validation": validation,
        "--validation-family": validation_family or None,
        "--share": share,
        "--num-safety": num_safety,
        "--num-utility": num_utility,
    }
    adapting = {
        "--mask": mask,
        "--steps": steps,
        "--rate": rate,
        "--refusal-budget": refusal_budget,
    }
    refuse_misfits(adapt, learning, adapting)
    if adapt:
        assert mask is not None
        budget = ADAPTATION_BUDGET if refusal_budget is None else refusal_budget
        _adapt(request, mask, steps or ADAPTATION_STEPS, ADAPTATION_RATE if rate is None else rate, budget)
    else:
        assert scores is not None
        counts = None if num_safety is None or num_utility is None else (num_safety, num_utility)
        families = validation_family or []
        _tune(request, scores, validation, families, counts, SHARE if share is None else share)


def _tune(
    request: _Request,
    scores: Path,
    validation: Path | None,
    families: list[str],
    counts: tuple[int, int] | None,
    share: float,
) -> None:
    from modulation.attribution.reading import examples_of
    from modulation.attribution.scores import ScoresFile
    from modulation.checkpoints import checkpoint_beside
    from modulation.tuning.runs import TuningRun
    from modulation.tuning.runs import tune as tune_mask

    settings = TuningSettings.parse(request.option)
    training, kept_aside, told = _records(request.data, validation, families)
    typer.echo(told)
    found = ScoresFile.load(scores)
    opened = open_model(request.model, request.device, request.dtype)
    typer.echo(str(opened))
    sizes = _sizes(opened, counts, share, settings)
    draft = _draft(opened, request.model, found, _provenance(scores, found), sizes)
    data, validated = (
        examples_of(records, opened, request.refusal, settings.batch_size)
        for records in (training, kept_aside)
    )
    checkpoint = checkpoint_beside(request.out)
    with tqdm(unit="step") as bar:
        tuned = tune_mask(
            opened.model,
            opened.tokenizer,
            data,
            validated,
            draft,
            TuningRun(settings, request.seed, sizes[1:]),
            checkpoint_path=checkpoint,
            on_step=_shown_on(bar),
        )
    tuned.mask.save(request.out)
    checkpoint.unlink(missing_ok=True)
    typer.echo(_report(tuned, request, validation))


def _records(
    data: Path, validation: Path | None, families: list[str]
) -> "tuple[list[Record], list[Record], str]":
    """What to learn from, what to validate on, and both in words."""
    from modulation.evaluation.data import read_records
    from modulation.tuning.validation import split

    records = read_records(data)
    if validation is not None:
        own = read_records(validation)
        told = f"Learning from {len(records)} prompts of {data}, validating on {len(own)} of {validation}."
        return records, own, told
    parted = split(records, families)
    return parted.training, parted.validation, str(parted)


def _provenance(path: Path, scores: "ScoresFile") -> dict[str, Any]:
    metadata = scores.metadata
    return {
        "method": {
            "attribution": {
                "method": metadata.method,
                "options": metadata.options,
                "scores": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
        },
        "data_digests": {"attribution": metadata.data_digest},
        "seeds": {"attribution": metadata.seed},
    }


def _draft(
    opened: "Opened",
    model: str,
    scores: "ScoresFile",
    provenance: Mapping[str, Any],
    sizes: "Sequence[Threshold]",
) -> "Mask":
    from modulation.tuning.drafting import draft, first_neurons

    scores.verify(opened.model)
    return draft(opened.model, model_id(model), *first_neurons(scores.scores, sizes), **provenance)


def _sizes(
    opened: "Opened", counts: tuple[int, int] | None, share: float, settings: TuningSettings
) -> "tuple[Threshold, ...]":
    from modulation.levels import Threshold
    from modulation.tuning.drafting import counts as counts_of
    from modulation.tuning.drafting import stage_sizes

    final = Threshold(*(counts or counts_of(opened.model, share)))
    return stage_sizes(opened.model, settings.prune_shares, final)


def _shown_on(bar: "tqdm[Never]") -> "OnStep":
    def show(step: int, total: int, loss: float, validation: float | None) -> None:
        if bar.total is None:  # what an interrupted run did counts as done, but not for the time left
            bar.total, bar.initial, bar.n = total, step - 1, step - 1
        best = "" if validation is None else f", best validation {validation:.3f}"
        bar.set_postfix_str(f"loss {loss:.3f}{best}", refresh=False)
        bar.update(step - bar.n)

    return show


def _report(tuned: "Tuned", request: _Request, validation: Path | None) -> str:
    from modulation.tuning.summary import factors_table, history_table, levels_list

    learned = tuned.learned
    prompts = validation or Path("VALIDATION.jsonl")
    return "\n\n".join(
        [
            f"\n{history_table(learned.history, learned.num_steps)}",
            f"Factors after {learned.num_steps} steps:\n\n{factors_table(tuned.mask)}",
            f"Levels, to begin with: {levels_list(tuned.mask)}",
            f"Wrote {request.out}. Choose its levels by measurement:\n"
            f"  neurontune levels --model {request.model} --mask {request.out} --data {prompts} "
            "--out mask.safetensors",
        ]
    )


def settings_to_adapt(mask: "Mask", option: Sequence[str]) -> TuningSettings:
    """The mask's own with a margin to adapt for, and `option` in their place; says which of the mask's there
    are no more. Raises DataError for options that adaptation does not go by."""
    from modulation.tuning.runs import forgotten_settings, settings_of

    for each in option:
        if (name := each.split("=")[0]) in TuningSettings.model_fields and name not in ADAPTATION_OPTIONS:
            raise DataError(
                f"Option {each!r} does not go with --adapt, which has --steps, --rate and --refusal-budget; "
                f"accepted: {', '.join(ADAPTATION_OPTIONS)}."
            )
    for name, value in forgotten_settings(mask).items():
        typer.echo(f"The mask was tuned with {name}={value} too, which is no option any more; left out.")
    own = settings_of(mask)
    margin = max(ADAPTATION_MARGIN, own.get("attacked_margin", 0.0))
    # A weight of 0, which tuning may have, would leave no direction to keep to.
    return TuningSettings.parse(option, {**own, "attacked_margin": margin, "borderline_weight": 1.0})


def _adapt(request: _Request, path: Path, num_steps: int, rate: float, budget: float) -> None:
    from modulation.attribution.reading import examples_of
    from modulation.evaluation.data import read_records
    from modulation.masks import Mask
    from modulation.tuning.runs import AdaptationRun, adapt_mask
    from modulation.tuning.summary import movement_table

    mask = Mask.load(path)
    settings = settings_to_adapt(mask, request.option)
    records = read_records(request.data)
    opened = open_model(request.model, request.device, request.dtype)
    typer.echo(str(opened))
    mask.verify(opened.model)
    data = examples_of(records, opened, request.refusal, settings.batch_size)
    run = AdaptationRun(settings, num_steps, rate, budget, request.seed)
    adapted = adapt_mask(opened.model, opened.tokenizer, data, mask, run)
    adapted.save(request.out)
    taken, (before, after) = (
        adapted.metadata.method["adaptation"][name] for name in ("num_steps", "refusal_of_borderline")
    )
    typer.echo(
        f"\nTook {taken} of {num_steps} steps. A refusal of the borderline prompts, all neurons active, was "
        f"probable by {before:.3f}, now by {after:.3f} (mean; --refusal-budget {budget:g})."
    )
    if taken < num_steps:
        typer.echo("The others went beyond the budget: a smaller --rate or a larger budget takes more.")
    typer.echo(f"\nHow far they moved the factors:\n\n{movement_table(mask, adapted)}")
    typer.echo(f"\nWrote {request.out}. Its levels are those of {path}, not measured anew.")
