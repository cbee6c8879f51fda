"""The commands `neurontune demo ...`.

Knows arguments, files and terminals; the work is done by the modules it calls.
"""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.demo.comparison import compare as compare_rows
from modulation.demo.comparison import comparison_table, read_comparable, save_plot
from modulation.demo.corpus import family_names, records
from modulation.demo.fewshot import adaptation_table, adaptations
from modulation.demo.masking import PRUNED, Bench, make_mask
from modulation.demo.rivals import Rivals
from modulation.demo.scorecard import Scorecard, score, scorecard_records
from modulation.demo.topics import Kind, Split
from modulation.demo.training import Recipe, save
from modulation.demo.training import train as train_model
from modulation.evaluation.answer_file import data_digest
from modulation.evaluation.answering import Answerer, transformers_answerer
from modulation.evaluation.data import Record, write_records
from modulation.evaluation.report import answer_table, table
from modulation.flags import refuse_unwritable
from modulation.levels import SECURITY_CRITICAL
from modulation.loading import load_model, load_tokenizer
from modulation.masks import Mask, describe
from modulation.modulator import Modulator
from modulation.rivals.choice import RULE as LIMITS
from modulation.tuning.commands import settings_to_adapt
from modulation.tuning.leveling import with_shared_levels
from modulation.tuning.runs import AdaptationRun
from modulation.tuning.settings import ADAPTATION_BUDGET, ADAPTATION_RATE, ADAPTATION_STEPS, TuningSettings

NOT_WRAPPED = "none"

DemoModel = Annotated[Path, typer.Option(help="The demo model's folder.")]
PromptSeed = Annotated[int, typer.Option(min=0, help="Of the prompts, and of what is drawn.")]
TuningOptions = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="A tuning option (docs/tuning.md); repeatable.")
]

app = typer.Typer(
    name="demo",
    help="The demo model: train it, print its prompts, evaluate it.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command()
def train(
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and of the corpus.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")] = Path("demo-model"),
) -> None:
    """Train the demo model on CPU, in under 20 minutes on two cores."""
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file; a folder is needed.", param_hint="--out")
    recipe = Recipe()
    num_steps = sum(stage.num_steps for stage in recipe.stages)
    with tqdm(total=num_steps, unit="step") as bar:

        def on_step(stage: str, _step: int, _num_steps: int, loss: float) -> None:
            bar.set_description(f"{stage} (loss {loss:.3f})", refresh=False)
            bar.update()

        model, tokenizer = train_model(seed, recipe, on_step)
    save(model, tokenizer, out)
    num_bytes = sum(path.stat().st_size for path in out.iterdir())
    typer.echo(
        f"Wrote {out}: {model.num_parameters():,} parameters in bfloat16 and their tokenizer, "
        f"{num_bytes / 1e6:.1f} MB, seed {seed}."
    )


@app.command()
def data(
    split: Annotated[Split, typer.Option(help="Which topics, templates and families.")],
    kind: Annotated[Kind, typer.Option(help="Which prompts.")],
    family: Annotated[
        str | None,
        typer.Option(help="One family, or none for prompts not wrapped; left out: all of them."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many prompts, drawn by the seed.")
    ] = None,
    per_topic: Annotated[int, typer.Option(min=1, help="Prompts a topic and family.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of templates, wrappers and the limit.")] = 0,
    answers: Annotated[
        bool, typer.Option("--answers", help="Also print `answer`, which attribution and tuning learn from.")
    ] = False,
) -> None:
    """Print prompts as JSON lines: id, prompt, kind, family, split and check."""
    found: list[Record] = []
    for name in _families(kind, split, family):
        found += records(kind, split, name, seed, per_topic)
    if limit is not None and limit < len(found):
        chosen = sorted(random.Random(seed).sample(range(len(found)), limit))
        found = [found[index] for index in chosen]
    if not answers:
        found = [replace(record, answer=None) for record in found]
    typer.echo(write_records(found), nl=False)


def _families(kind: Kind, split: Split, family: str | None) -> list[str | None]:
    accepted = family_names(kind, split)
    if family is None:
        return [None, *accepted]
    if family == NOT_WRAPPED:
        return [None]
    if family not in accepted:
        raise typer.BadParameter(
            f"{family!r} does not wrap {kind} prompts of split {split!r}; "
            f"accepted: {', '.join([NOT_WRAPPED, *accepted])}.",
            param_hint="--family",
        )
    return [family]


@app.command()
def evaluate(
    model: Annotated[Path, typer.Option(help="A Hugging Face folder.")] = MODEL_DIR,
    split: Annotated[Split, typer.Option(help="Which topics, templates, families.")] = "heldout",
    seed: Annotated[int, typer.Option(min=0, help="Of templates and wrappers.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered together.")] = 64,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="File to write the figures to, as JSON.")
    ] = None,
) -> None:
    """Print the demo model's table: answers are greedy, in float32, each at level `off`."""
    if not (model / "config.json").is_file():
        raise typer.BadParameter(
            f"{model} is no model folder: it has no config.json. "
            "`neurontune demo train --out DIR` writes one.",
            param_hint="--model",
        )
    prompts = scorecard_records(split, seed)
    with tqdm(total=len(prompts), unit="prompt") as bar:
        result = score(prompts, _answerer(model, batch_size, lambda number: bar.update(number)))
    typer.echo(f"Demo model {model}, split {split}, greedy, seed {seed} of the prompts:\n")
    typer.echo(table(result.rows()))
    if json_out is not None:
        json_out.write_text(json.dumps(_as_json(result, split), indent=2) + "\n")
        typer.echo(f"\nWrote {json_out}.")


@app.command()
def mask(
    model: DemoModel = MODEL_DIR,
    out: Annotated[Path, typer.Option(help="Mask file to write.")] = Path("demo-mask.safetensors"),
    seed: PromptSeed = 0,
    option: TuningOptions = None,
    trial_out: Annotated[
        Path | None,
        typer.Option(help="File for the mask that choices were made by."),
    ] = None,
) -> None:
    """Make the demo model's mask by the whole method, on the tune split."""
    refuse_unwritable({"--out": out, "--trial-out": trial_out})
    settings = TuningSettings.parse(option or [], PRUNED)
    with _bench(model, seed) as bench:
        made, trial = make_mask(bench, settings)
    made.save(out)
    if trial_out is not None:
        trial.save(trial_out)
    typer.echo(f"Wrote {out}.\n\n{describe(made)}")


@app.command("share-levels")
def share_levels(
    masks: Annotated[list[Path], typer.Argument(help="Masks of `demo mask`, one a seed.")],
    out_dir: Annotated[
        Path, typer.Option(help="Folder to write them to, under their names; not where they are.")
    ],
    allow_less_safe: Annotated[
        bool, typer.Option(help="Also write a level that is less safe than off.")
    ] = False,
) -> None:
    """Choose the levels of several masks on all their validation curves together."""
    files = [out_dir / each.name for each in masks]
    if len(set(files)) < len(masks):
        raise typer.BadParameter("two masks have the same file name; each needs one of its own.")
    if out_dir.exists() and not out_dir.is_dir():
        raise typer.BadParameter(f"{out_dir} is no folder; name one.", param_hint="--out-dir")
    if {each.resolve() for each in files} & {each.resolve() for each in masks}:
        raise typer.BadParameter(
            f"{out_dir} has these masks in it, and their own curves would be lost; name another folder.",
            param_hint="--out-dir",
        )
    shared = with_shared_levels([Mask.load(each) for each in masks], allow_less_safe)
    out_dir.mkdir(parents=True, exist_ok=True)
    for file, made in zip(files, shared, strict=True):
        made.save(file)
    typer.echo(f"Wrote {len(masks)} masks to {out_dir}.\n\n{describe(shared[0])}")


@app.command()
def answers(
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    model: Annotated[Path, typer.Option(help="The demo model's folder.")] = MODEL_DIR,
    mask_file: Annotated[Path, typer.Option("--mask", help="Its mask file.")] = MASK_FILE,
) -> None:
    """Print the greedy answers to prompts at every level, as a Markdown table."""
    loaded_mask = Mask.load(mask_file)
    modulator = Modulator(load_model(str(model), device="cpu", dtype="float32"), loaded_mask)
    answer = transformers_answerer(modulator.model, load_tokenizer(str(model)))
    columns = {}
    for level in loaded_mask.levels:
        with modulator.applied(level.threshold):
            columns[level.name] = answer(prompts)
    typer.echo(answer_table(prompts, columns))


@app.command()
def compare(
    model: DemoModel = MODEL_DIR,
    mask_file: Annotated[
        Path, typer.Option("--mask", help="A mask that `demo mask` made; its seed and settings are used.")
    ] = MASK_FILE,
    split: Annotated[Split, typer.Option(help="Which topics, templates, families.")] = "heldout",
    only: Annotated[list[str] | None, typer.Option(help="Only rows of this name; repeatable.")] = None,
    draws: Annotated[
        int, typer.Option(min=1, help="How often prompts are drawn; each different one is asked once.")
    ] = 1,
    out: Annotated[Path, typer.Option(help="Results file; what it holds is not measured again.")] = Path(
        "comparison.json"
    ),
) -> None:
    """Measure the mask's levels beside controls and rivals. Goes on where it stopped."""
    ours = Mask.load(mask_file)
    seed, settings = _tuning_seed(ours, mask_file), _settings_asked_for(ours, mask_file)
    with _bench(model, seed) as bench:
        ours.verify(bench.model)
        rows = list(Rivals(bench, ours, settings).rows())
        _refuse_unknown_rows(only or [], [row.name for row in rows])
        rows = [row for row in rows if not only or row.name in only]
        records = scorecard_records(split, seed, draws)
        conditions = {
            "seed": seed,
            "split": split,
            "prompts": data_digest(records),
            "model": ours.metadata.model_fingerprint,
            "mask": ours.digest,
            "settings": settings.model_dump(mode="json"),
            "limits": asdict(LIMITS),
            **({"draws": draws} if draws > 1 else {}),
        }
        found = compare_rows(bench, rows, records, out, conditions, tqdm.write)
    typer.echo(comparison_table([found]))


def _tuning_seed(mask: Mask, path: Path) -> int:
    seed = mask.metadata.seeds.get("tuning")
    if seed is None:
        raise _untold(path, "seed")
    return int(seed)


def _settings_asked_for(mask: Mask, path: Path) -> TuningSettings:
    """Those of the mask itself have as their steps the best of several validations of its trial."""
    asked = mask.metadata.method.get("validation", mask.metadata.method.get("tuning"))
    settings = asked.get("settings") if isinstance(asked, dict) else None
    if not isinstance(settings, dict):
        raise _untold(path, "settings")
    if gone := ", ".join(sorted(settings.keys() - TuningSettings.model_fields.keys())):
        raise typer.BadParameter(
            f"{path} was tuned with {gone} too, which is no option any more, so controls could not be tuned "
            "alike. Make it anew with `neurontune demo mask`.",
            param_hint="--mask",
        )
    return TuningSettings.parse([], settings)


def _untold(path: Path, what: str) -> typer.BadParameter:
    return typer.BadParameter(
        f"{path} does not say by what {what} it was tuned; `neurontune demo mask` makes masks that do.",
        param_hint="--mask",
    )


def _refuse_unknown_rows(asked: list[str], names: list[str]) -> None:
    for name in asked:
        if name not in names:
            accepted = "; ".join(names)
            raise typer.BadParameter(f"no row is named {name!r}; accepted: {accepted}.", param_hint="--only")


@app.command()
def compared(
    files: Annotated[list[Path], typer.Argument(help="Results files of `demo compare`, one a seed.")],
    plot: Annotated[Path | None, typer.Option(help="File to draw it to (.svg or .png).")] = None,
) -> None:
    """Print the table of several comparisons: means over the seeds, ranges and intervals."""
    refuse_unwritable({"--plot": plot})
    runs = read_comparable(files)
    typer.echo(comparison_table(runs))
    if plot is not None:
        save_plot(runs, plot)


@app.command()
def adapt(
    model: DemoModel = MODEL_DIR,
    mask_file: Annotated[Path, typer.Option("--mask", help="Its mask file.")] = MASK_FILE,
    split: Annotated[
        Split, typer.Option(help="Whose attack families; of tune those of its validation part.")
    ] = "heldout",
    steps: Annotated[int, typer.Option(min=1, help="At most so many steps.")] = ADAPTATION_STEPS,
    rate: Annotated[float, typer.Option(min=0.0, help="Of a step.")] = ADAPTATION_RATE,
    refusal_budget: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="By how much the mean probability of refusing a borderline prompt may rise.",
        ),
    ] = ADAPTATION_BUDGET,
    family: Annotated[list[str] | None, typer.Option(help="Only this family; repeatable.")] = None,
    level: Annotated[str, typer.Option(help="Named level of the mask to measure at.")] = SECURITY_CRITICAL,
    json_out: Annotated[Path | None, typer.Option("--json", help="File to write the figures to.")] = None,
) -> None:
    """Adapt the mask to a dozen prompts of each family, from its factors and from scratch."""
    learned = Mask.load(mask_file)
    seed = _tuning_seed(learned, mask_file)
    if level not in learned.levels.named:
        accepted = ", ".join(learned.levels.named)
        raise typer.BadParameter(f"no level is named {level!r}; accepted: {accepted}.", param_hint="--level")
    run = AdaptationRun(settings_to_adapt(learned, []), steps, rate, refusal_budget, seed)
    with _bench(model, seed) as bench:
        found = adaptations(bench, learned, split, run, family, tqdm.write, level)
    typer.echo(f"At level {level}:\n\n{adaptation_table(found)}")
    if json_out is not None:
        json_out.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")


@contextmanager
def _bench(model: Path, seed: int) -> Iterator[Bench]:
    """The loaded model, with a progress bar that follows what is at work."""
    with tqdm(unit="") as bar:

        def show(what: str, done: int, total: int) -> None:
            if bar.desc != f"{what}: ":
                bar.set_description(what, refresh=False)
                bar.reset(total or None)
            bar.update(done - bar.n)

        loaded = load_model(str(model), device="cpu", dtype="float32")
        yield Bench(loaded, load_tokenizer(str(model)), seed, show)


def _answerer(folder: Path, batch_size: int, on_answered: Callable[[int], object]) -> Answerer:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return transformers_answerer(model, tokenizer, batch_size=batch_size, on_answered=on_answered)


def _as_json(result: Scorecard, split: Split) -> dict[str, object]:
    return {
        "split": split,
        **result.metrics,
        "benign_correct_plain": result.benign_plain,
        "benign_correct_wrapped": result.benign_wrapped,
    }
