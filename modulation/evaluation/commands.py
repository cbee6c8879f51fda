"""The command `neurontune evaluate`: any file of prompts, at any levels, in process or through a URL.

Knows flags, files and terminals; the work is done by the modules it calls.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from tqdm import tqdm

from modulation.demo import DEMO
from modulation.errors import DataError
from modulation.evaluation.answer_file import AnswerFile, data_digest
from modulation.evaluation.attacks import NONE
from modulation.evaluation.examples import example_records
from modulation.evaluation.flags import endpoint_of, given, refuse_misfits
from modulation.evaluation.judges import RULE, Judge, by_rule
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
from modulation.evaluation.quality import Figures
from modulation.evaluation.remote import refuse_unreachable
from modulation.evaluation.report import figures_table
from modulation.evaluation.run import Evaluation, evaluate_levels
from modulation.evaluation.sources import Source, behind_url, in_process
from modulation.flags import Device, Dtype, command_line, parse_levels
from modulation.opening import open_mask

if TYPE_CHECKING:
    from modulation.masks import Mask

INTERRUPTED: Final = 130


def evaluate(
    ctx: typer.Context,
    data: DataFile,
    model: Annotated[
        str, typer.Option(help="'demo', a Hugging Face folder, or a hub name; with --url: its name there.")
    ] = DEMO,
    mask: MaskFile = None,
    levels: Annotated[
        str, typer.Option(help="Level names or numbers, separated by commas; left out: all there are.")
    ] = "",
    kind: PromptKind = None,
    attacks: Attacks = NONE,
    seed: Annotated[int, typer.Option(min=0, help="Of the wrappers that --attacks begins with.")] = 0,
    max_new_tokens: MaxNewTokens = 64,
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
    json_out: JsonOut = None,
    html_out: HtmlOut = None,
    answers_out: Annotated[
        Path | None, typer.Option(help="File of answers and verdicts, written on the way; gone on from.")
    ] = None,
) -> None:
    """Answer a file of prompts at several safety levels and judge the answers."""
    reads = {"--data": data, "--mask": mask, "--judge-prompt": judge_prompt}
    refuse_outputs(json_out, html_out, reads, {"--answers-out": answers_out})
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
    prompts = read_prompts(data, kind, attacks, seed)
    typer.echo(f"{data}: {prompts}")
    asking = given({"concurrency": concurrency, "timeout_seconds": timeout, "max_retries": retries})
    judge, judge_name = _judge(judge_url, judge_model, judge_prompt, judge_api_key_env, asking)
    loaded_mask = None if url else open_mask(model, mask)
    if loaded_mask is None:
        endpoint = endpoint_of("--url", url, model, "--api-key-env", api_key_env, asking)
        source = behind_url(endpoint, names, max_new_tokens=max_new_tokens, warn=_warn)
    else:
        source, _ = in_process(
            model,
            loaded_mask,
            names,
            device=device or "auto",
            dtype=dtype or "auto",
            batch_size=batch_size or 64,
            max_new_tokens=max_new_tokens,
        )
    run = provenance(data, prompts, source, judge_name, command_line(ctx))
    evaluation = Evaluation(prompts.records, source.answer_at, judge, judge_name, source.measures)
    found, kept = _evaluated(evaluation, source, answers_out)
    for level, figures in found.items():
        typer.echo(f"\n{source.titles[level]}:\n\n{figures_table(figures)}")
    result = {"run": run, "levels": found}
    write_outputs(json_out, result, html_out, lambda: _page(found, run, loaded_mask, evaluation, kept))


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


def _evaluated(
    evaluation: Evaluation, source: Source, answers_out: Path | None
) -> tuple[dict[str, Figures], AnswerFile]:
    """The figures by level, and the answers that are behind them."""
    run = {"data": data_digest(evaluation.records), **source.run}
    with AnswerFile(answers_out, run) as kept, tqdm(unit="answer", disable=None) as bar:
        bar.total = len(evaluation.records) * len(source.titles) * (1 if evaluation.judge_name == RULE else 2)
        bar.update(kept.num_done(evaluation.records, source.titles, evaluation.judge_name))
        evaluation = replace(evaluation, on_done=bar.update)
        try:
            return evaluate_levels(evaluation, list(source.titles), kept), kept
        except KeyboardInterrupt:
            bar.close()
            if answers_out is None:
                _warn("Stopped. The answers are lost; with --answers-out they would not be.")
            else:
                _warn(f"Stopped. {answers_out} has the answers; the same command goes on from there.")
            raise typer.Exit(INTERRUPTED) from None


def _page(
    found: Mapping[str, Figures],
    run: dict[str, str],
    mask: "Mask | None",
    evaluation: Evaluation,
    kept: AnswerFile,
) -> str:
    from modulation.evaluation.html_report import ExampleAnswers, evaluation_page

    examples = []
    for record in example_records(evaluation.records):
        answers = {level: kept.known(level, record).answer for level in found}
        examples.append(ExampleAnswers(record.prompt, record.kind, answers, record.family))
    return evaluation_page({"levels": found}, dated(run), mask, examples)


def _warn(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
