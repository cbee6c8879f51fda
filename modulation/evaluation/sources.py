"""Where answers come from: a model in this process, or a server behind a URL, each with its levels.

Knows how the two are set up from what a command was told. Knows nothing of prompts, judges or printing.
Imports torch only for a model in this process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.errors import DataError, LevelError
from modulation.evaluation.remote import Endpoint, Reply, ask, listed_levels, user
from modulation.evaluation.run import AnswerAt, OnAnswer
from modulation.levels import SafetyLevels

DEMO: Final = "demo"
SERVER_DEFAULT: Final = "default"


@dataclass(frozen=True)
class Source:
    """`titles` has a line for people on each level, in the order they are answered at; `run` is what
    the answers depend on besides prompt and level."""

    titles: Mapping[str, str]
    answer_at: AnswerAt
    run: Mapping[str, Any]


def in_process(
    model: str,
    mask: Path | None,
    levels: Sequence[str],
    *,
    device: str,
    dtype: str,
    batch_size: int,
    max_new_tokens: int,
) -> Source:
    """A model, by folder or name, with a mask; no levels: all of the mask's.

    Raises DataError, LevelError, MaskError or ModelError; the levels are read before the model is.
    """
    if mask is None and model != DEMO:
        raise DataError(f"--mask is missing: model {model!r} has no shipped mask.")
    from modulation.evaluation.levels import answering_in_process
    from modulation.loading import load_model, load_tokenizer, resolve_device, resolve_dtype
    from modulation.masks import Mask
    from modulation.modulator import Modulator

    loaded = Mask.load(mask or MASK_FILE)
    titles = _titles(loaded.levels, levels)
    on = resolve_device(device)
    kept_as = resolve_dtype(dtype, on.value)
    folder = str(MODEL_DIR) if model == DEMO else model
    tokenizer = load_tokenizer(folder)
    modulator = Modulator(load_model(folder, device=on.value, dtype=kept_as.value), loaded)
    return Source(
        titles=titles,
        answer_at=answering_in_process(modulator, tokenizer, loaded.levels, max_new_tokens, batch_size),
        run={"model": model, "mask": loaded.digest, "dtype": kept_as.value, "max_new_tokens": max_new_tokens},
    )


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
        run={
            "model": f"{endpoint.model} at {endpoint.url}",
            "mask": listed.mask,
            "max_new_tokens": max_new_tokens,
        },
    )


def parse_levels(text: str) -> tuple[str, ...]:
    """Names and numbers separated by commas; an empty text means none. Raises LevelError."""
    names = tuple(name.strip() for name in text.split(",")) if text else ()
    if "" in names:
        raise LevelError(f"--levels {text!r} has an empty name.")
    if len(set(names)) < len(names):
        raise LevelError(f"--levels {text!r} names a level twice.")
    return names


def _titles(offered: SafetyLevels, names: Sequence[str]) -> dict[str, str]:
    chosen = [offered.parse(name) for name in names] or list(offered)
    return {
        level.name: f"{level.name} ({level.threshold.num_safety}, {level.threshold.num_utility})"
        for level in chosen
    }
