"""Where answers come from: a model in this process, or a server behind a URL, each with its levels.

Knows how the two are set up from what a command was told, and what can be measured on each. Knows nothing
of prompts, judges or printing. Imports torch only for a model in this process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from modulation.evaluation.data import Record
from modulation.evaluation.quality import Figures, text_quality
from modulation.evaluation.remote import Endpoint, Reply, ask, listed_levels, user
from modulation.evaluation.run import AnswerAt, Measure, OnAnswer
from modulation.levels import SafetyLevels
from modulation.opening import Opened, open_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from modulation.masks import Mask

SERVER_DEFAULT: Final = "default"


@dataclass(frozen=True)
class Source:
    """`titles` has a line for people on each level, in the order they are answered at; `run` is what
    the answers depend on besides prompt and level, `told` how they are made, in words."""

    titles: Mapping[str, str]
    answer_at: AnswerAt
    measures: Sequence[Measure]
    run: Mapping[str, Any]
    told: str


def in_process(
    model: str,
    mask: "Mask",
    levels: Sequence[str],
    *,
    device: str,
    dtype: str,
    batch_size: int,
    max_new_tokens: int,
) -> tuple[Source, "PreTrainedModel"]:
    """A model, by folder or name, with its mask; no levels: all of the mask's.

    Raises LevelError, MaskError or ModelError; the levels are read before the model is.
    """
    titles = _titles(mask.levels, levels)
    opened = open_model(model, device, dtype)
    answer_at, measures = _modulated(opened, mask, batch_size, max_new_tokens)
    kept_as = opened.dtype.value
    source = Source(
        titles=titles,
        answer_at=answer_at,
        measures=measures,
        run={"model": model, "mask": mask.digest, "dtype": kept_as, "max_new_tokens": max_new_tokens},
        told=f"greedy, at most {max_new_tokens} tokens, {opened}",
    )
    return source, opened.model


def _modulated(
    opened: Opened, mask: "Mask", batch_size: int, max_new_tokens: int
) -> tuple[AnswerAt, Sequence[Measure]]:
    from modulation.evaluation.levels import answering_in_process, perplexity_in_process
    from modulation.modulator import Modulator

    modulator = Modulator(opened.model, mask)
    answer_at = answering_in_process(modulator, opened.tokenizer, mask.levels, max_new_tokens, batch_size)
    perplexity = perplexity_in_process(modulator, opened.tokenizer, mask.levels, batch_size)
    return answer_at, (perplexity, _measure_texts)


def _measure_texts(_level: str, _records: Sequence[Record], answers: Sequence[str]) -> Figures:
    quality = text_quality(answers)
    return Figures(repetition=quality["repetition"], length=quality["length"])


def behind_url(
    endpoint: Endpoint, levels: Sequence[str], *, max_new_tokens: int, warn: Callable[[str], object]
) -> Source:
    """A server as it is deployed; no levels: those it lists, or just its own default.

    `warn` is told once where the server does not say which level it applied. Raises RemoteError.
    """
    listed = listed_levels(endpoint)
    names = tuple(levels) or listed.names
    warned: list[str] = []

    def check(reply: Reply) -> None:
        if names and reply.level is None and not warned:
            warned.append(f"{endpoint.url} did not say which level it applied: the figures rest on trust.")
            warn(warned[0])

    def answer_at(level: str, prompts: Sequence[str], on_answer: OnAnswer) -> None:
        def on_reply(row: int, reply: Reply) -> None:
            check(reply)
            on_answer(row, reply.text)

        asked = level if names else None
        ask(endpoint, [user(prompt) for prompt in prompts], max_new_tokens, asked, on_reply)

    return Source(
        titles={name: f"{name} at {endpoint.url}" for name in names or (SERVER_DEFAULT,)},
        answer_at=answer_at,
        measures=(_measure_texts,),
        run={
            "model": f"{endpoint.model} at {endpoint.url}",
            "mask": listed.mask,
            "max_new_tokens": max_new_tokens,
        },
        told=f"greedy, at most {max_new_tokens} tokens, over HTTP",
    )


def _titles(offered: SafetyLevels, names: Sequence[str]) -> dict[str, str]:
    chosen = [offered.parse(name) for name in names] or list(offered)
    return {
        level.name: f"{level.name} ({level.threshold.num_safety}, {level.threshold.num_utility})"
        for level in chosen
    }
