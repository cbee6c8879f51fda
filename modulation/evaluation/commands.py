"""The command `neurontune evaluate`: any file of prompts, at any levels, in process or through a URL.

Knows flags, files and terminals; the work is done by the modules it calls.
"""

import json
import os
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
from modulation.evaluation.datasets import read_dataset
from modulation.evaluation.judges import RULE, Judge, by_rule
from modulation.evaluation.metrics import Rate
from modulation.evaluation.remote import NO_KEY, Endpoint
from modulation.evaluation.report import table
from modulation.evaluation.run import Evaluation, evaluate_levels
from modulation.evaluation.sources import DEMO, Source, behind_url, in_process, parse_levels

KEY_VARIABLE: Final = "OPENAI_API_KEY"
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
    api_key_env: Annotated[str, typer.Option(help="Variable that holds the server's key.")] = KEY_VARIABLE,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once, to server and judge.")] = 8,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that one request may take.")] = 120.0,
    retries: Annotated[
        int,
        typer.Option(min=0, help="Tries after a failed one, with growing pauses, on 429, 5xx and the like."),
    ] = 5,
    judge_url: Annotated[str, typer.Option(help="Judge by a model behind this server.")] = "",
    judge_model: Annotated[str, typer.Option(help="The judge's name there.")] = "",
    judge_prompt: Annotated[Path | None, typer.Option(help="The judge's prompt; left out: ours.")] = None,
    judge_api_key_env: Annotated[
        str, typer.Option(help="Variable that holds the key of the judge's server.")
    ] = KEY_VARIABLE,
    json_out: Annotated[Path | None, typer.Option("--json", help="File to write the figures to.")] = None,
    answers_out: Annotated[
        Path | None, typer.Option(help="File of answers and verdicts, written on the way; gone on from.")
    ] = None,
) -> None:
    """Answer a file of prompts at several safety levels and judge the answers."""
    _refuse_unwritable({"--json": json_out, "--answers-out": answers_out})
    if url:
        _refuse_given({"--mask": mask, "--device": device, "--dtype": dtype, "--batch-size": batch_size})
    records = _prompts(data, kind, attacks, seed)
    names = parse_levels(levels)
    asking = {"concurrency": concurrency, "timeout_seconds": timeout, "max_retries": retries}
    judge, judge_name = _judge(judge_url, judge_model, judge_prompt, judge_api_key_env, asking)
    if url:
        endpoint = _endpoint("--url", url, model, "--api-key-env", api_key_env, asking)
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


def _refuse_unwritable(files: Mapping[str, Path | None]) -> None:
    for flag, path in files.items():
        if path is not None and not path.parent.is_dir():
            raise DataError(f"{flag} {path}: the folder {path.parent} does not exist.")
        if path is not None and path.is_dir():
            raise DataError(f"{flag} {path} is a folder; a file is needed.")


def _refuse_given(flags: Mapping[str, object]) -> None:
    for flag, value in flags.items():
        if value is not None:
            raise DataError(f"{flag} does not go with --url, where the server has its own. Leave one out.")


def _prompts(data: Path, kind: str | None, attacks: str, seed: int) -> list[Record]:
    families = parse_families(attacks)
    dataset = read_dataset(data, kind)
    wrapped = attacked(dataset.records, families, seed)
    if families and not wrapped:
        raise DataError(f"--attacks {attacks}: {data} holds no plain harmful prompt to wrap.")
    inside = f"; {len(wrapped)} more inside {len(families)} attack families" if families else ""
    typer.echo(f"{data}: {dataset}{inside}.")
    return [*dataset.records, *wrapped]


def _judge(
    url: str, model: str, prompt: Path | None, key_variable: str, asking: Mapping[str, Any]
) -> tuple[Judge, str]:
    """The judge and what tells it from others; the rule where no judge model is asked for."""
    if not url:
        given = {"--judge-model": model or None, "--judge-prompt": prompt}
        for flag in (flag for flag, value in given.items() if value is not None):
            raise DataError(f"{flag} needs --judge-url, the address of the judge's server.")
        return by_rule, RULE
    if not model:
        raise DataError("--judge-url needs --judge-model, the judge's name there.")
    from modulation.evaluation.model_judge import DEFAULT_PROMPT, model_judge, name_of, read_prompt

    endpoint = _endpoint("--judge-url", url, model, "--judge-api-key-env", key_variable, asking)
    text = read_prompt(prompt or DEFAULT_PROMPT)
    unread: list[str] = []

    def on_unread(reply: str) -> None:
        unread.append(reply)
        if len(unread) == 1:
            _warn(f"The judge's reply was no verdict, asked twice, and counts as unjudged: {reply[:200]!r}")

    return model_judge(endpoint, text, on_unread), name_of(endpoint, text)


def _endpoint(
    flag: str, url: str, model: str, key_flag: str, variable: str, asking: Mapping[str, Any]
) -> Endpoint:
    if not url.startswith(("http://", "https://")):
        raise DataError(f"{flag} {url!r} is no address; http://HOST:PORT/v1 or https://HOST/v1 is expected.")
    key = os.environ.get(variable, "")
    if not key and variable != KEY_VARIABLE:
        raise DataError(f"{key_flag} {variable}: this variable is not set, or is empty.")
    return Endpoint(url.rstrip("/"), model, key or NO_KEY, variable, **asking)


def _evaluated(evaluation: Evaluation, source: Source, answers_out: Path | None) -> dict[str, dict[str, Any]]:
    run = {"data": data_digest(evaluation.records), **source.run}
    with AnswerFile(answers_out, run) as kept, tqdm(unit="answer", disable=None) as bar:
        bar.total = len(evaluation.records) * len(source.titles)
        bar.update(kept.num_answered(evaluation.records, source.titles))
        evaluation = replace(evaluation, on_done=lambda what: bar.update(what == "answers"))
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
