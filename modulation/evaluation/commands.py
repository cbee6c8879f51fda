"""The command `neurontune evaluate`: any file of prompts, at any levels, in process or through a URL.

Knows flags, files and terminals; the work is done by the modules it calls.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
from tqdm import tqdm

from modulation.errors import DataError
from modulation.evaluation.answer_file import AnswerFile, data_digest
from modulation.evaluation.attacks import ATTACKS, NONE, attacked, parse_families
from modulation.evaluation.data import Record
from modulation.evaluation.datasets import other_kinds, read_dataset
from modulation.evaluation.flags import endpoint_of, given, refuse_misfits, refuse_unwritable
from modulation.evaluation.judges import RULE, Judge, by_rule
from modulation.evaluation.metrics import Rate
from modulation.evaluation.remote import refuse_unreachable
from modulation.evaluation.report import table
from modulation.evaluation.run import Evaluation, evaluate_levels
from modulation.evaluation.sources import DEMO, Source, behind_url, in_process, parse_levels

INTERRUPTED: Final = 130

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Kind = Literal["harmful", "benign", "borderline"]


def evaluate(
    data: Annotated[Path, typer.Option(help="Prompts: CSV or JSON lines (docs/evaluation.md).")],
    model: Annotated[
        str, typer.Option(help="'demo', a Hugging Face folder, or a hub name; with --url: its name there.")
    ] = DEMO,
    mask: Annotated[Path | None, typer.Option(help="Mask file; left out: the demo model's.")] = None,
    levels: Annotated[
        str, typer.Option(help="Level names or numbers, separated by commas; left out: all there are.")
    ] = "",
    kind: Annotated[
        Kind | None, typer.Option(help="What the prompts are, where two published files look the same.")
    ] = None,
    attacks: Annotated[
        str, typer.Option(help=f"Families to wrap plain harmful prompts in: all, none, {', '.join(ATTACKS)}.")
    ] = NONE,
    seed: Annotated[int, typer.Option(min=0, help="Of the wrappers that --attacks begins with.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    device: Annotated[Device | None, typer.Option(help="In process: where the model runs.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="In process: what its weights are kept as.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="In process: prompts answered together; left out: 64.")
    ] = None,
    url: Annotated[str, typer.Option(help="Ask this OpenAI-compatible server, http://.../v1.")] = "",
    api_key_env: Annotated[
        str | None, typer.Option(help="Variable that holds the server's key; left out: OPENAI_API_KEY.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests at once, to server and judge; left out: 8.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds that one request may take; left out: 120.")
    ] = None,
    retries: Annotated[
        int | None,
        typer.Option(min=0, help="Further tries, with pauses, after 429, 5xx and the like; left out: 5."),
    ] = None,
    judge_url: Annotated[str, typer.Option(help="Judge by a model behind this server.")] = "",
    judge_model: Annotated[str | None, typer.Option(help="The judge's name there.")] = None,
    judge_prompt: Annotated[Path | None, typer.Option(help="The judge's prompt; left out: ours.")] = None,
    judge_api_key_env: Annotated[
        str | None, typer.Option(help="Variable that holds its server's key; left out: OPENAI_API_KEY.")
    ] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="File to write the figures to.")] = None,
    answers_out: Annotated[
        Path | None, typer.Option(help="File of answers and verdicts, written on the way; gone on from.")
    ] = None,
) -> None:
    """Answer a file of prompts at several safety levels and judge the answers."""
    refuse_unwritable({"--json": json_out, "--answers-out": answers_out})
    refuse_misfits(
        url,
        judge_url,
        in_process={"--mask": mask, "--device": device, "--dtype": dtype, "--batch-size": batch_size},
        server={"--api-key-env": api_key_env},
        judge={
            "--judge-model": judge_model,
            "--judge-prompt": judge_prompt,
            "--judge-api-key-env": judge_api_key_env,
        },
        either={"--concurrency": concurrency, "--timeout": timeout, "--retries": retries},
    )
    names = parse_levels(levels)
    records = _prompts(data, kind, attacks, seed)
    asking = given({"concurrency": concurrency, "timeout_seconds": timeout, "max_retries": retries})
    judge, judge_name = _judge(judge_url, judge_model, judge_prompt, judge_api_key_env, asking)
    if url:
        endpoint = endpoint_of("--url", url, model, "--api-key-env", api_key_env, asking)
        source = behind_url(endpoint, names, max_new_tokens=max_new_tokens, warn=_warn)
    else:
        source = in_process(
            model,
            mask,
            names,
            device=device or "auto",
            dtype=dtype or "auto",
            batch_size=batch_size or 64,
            max_new_tokens=max_new_tokens,
        )
    found = _evaluated(Evaluation(records, source.answer_at, judge, judge_name), source, answers_out)
    _report(found, source)
    if json_out is not None:
        json_out.write_text(json.dumps({"levels": found}, indent=2) + "\n")
        typer.echo(f"\nWrote {json_out}.")


def _prompts(data: Path, kind: str | None, attacks: str, seed: int) -> list[Record]:
    families = parse_families(attacks)
    dataset = read_dataset(data, kind)
    wrapped = attacked(dataset.records, families, seed)
    if families and not wrapped:
        raise DataError(f"--attacks {attacks}: {data} holds no plain harmful prompt to wrap.")
    inside = f"; {len(wrapped)} more inside {len(families)} attack families" if families else ""
    typer.echo(f"{data}: {dataset}{inside}.")
    others = other_kinds(dataset.format) if kind is None else ()
    if others:
        typer.echo(f"If it is the other file with these columns: --kind {' or '.join(others)}.")
    return [*dataset.records, *wrapped]


def _judge(
    url: str, model: str | None, prompt: Path | None, key_variable: str | None, asking: Mapping[str, Any]
) -> tuple[Judge, str]:
    """The judge, and what tells it from others: the rule, or a model where there is a `url`."""
    if not url:
        return by_rule, RULE
    if not model:
        raise DataError("--judge-url needs --judge-model, the judge's name there.")
    from modulation.evaluation.model_judge import DEFAULT_PROMPT, model_judge, name_of, read_prompt

    endpoint = endpoint_of("--judge-url", url, model, "--judge-api-key-env", key_variable, asking)
    text = read_prompt(prompt or DEFAULT_PROMPT)
    refuse_unreachable(endpoint)  # now, and not after an hour of answers
    unread: list[str] = []

    def on_unread(reply: str) -> None:
        unread.append(reply)
        if len(unread) == 1:
            _warn(f"The judge's reply was no verdict, asked twice, and counts as unjudged: {reply[:200]!r}")

    return model_judge(endpoint, text, on_unread), name_of(endpoint, text)


def _evaluated(evaluation: Evaluation, source: Source, answers_out: Path | None) -> dict[str, dict[str, Any]]:
    run = {"data": data_digest(evaluation.records), **source.run}
    with AnswerFile(answers_out, run) as kept, tqdm(unit="answer", disable=None) as bar:
        bar.total = len(evaluation.records) * len(source.titles) * (1 if evaluation.judge_name == RULE else 2)
        bar.update(kept.num_done(evaluation.records, source.titles, evaluation.judge_name))
        evaluation = replace(evaluation, on_done=bar.update)
        try:
            return evaluate_levels(evaluation, list(source.titles), kept)
        except KeyboardInterrupt:
            bar.close()
            if answers_out is None:
                _warn("Stopped. The answers are lost; with --answers-out they would not be.")
            else:
                _warn(f"Stopped. {answers_out} has the answers; the same command goes on from there.")
            raise typer.Exit(INTERRUPTED) from None


def _report(found: Mapping[str, Mapping[str, Any]], source: Source) -> None:
    for level, metrics in found.items():
        typer.echo(f"\n{source.titles[level]}:\n")
        typer.echo(table(_rows(metrics)))


def _rows(metrics: Mapping[str, Any]) -> Iterable[tuple[str, Rate]]:
    """Every rate of a level; those of single attack families below the one of all."""
    for name, value in metrics.items():
        if name == "asr_by_family":
            yield from ((f"asr, {family}", rate) for family, rate in value.items())
        elif isinstance(value, Mapping) and "rate" in value:
            yield name, value  # type: ignore[misc]


def _warn(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
