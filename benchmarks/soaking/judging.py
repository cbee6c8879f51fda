"""Whether an answer is the one that was promised: complete, counted rightly, the same as when asked alone.

Knows answers and references. Knows no connection. Another mask or level shows in the log-probabilities of
nearly every token, also where it changes no word.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.soaking.asked import DEFAULT, MAX_TOKENS, Asked
from benchmarks.soaking.tally import LostError
from benchmarks.wire import Answer, Said, choices, events

MAX_DEVIATION: Final = 0.01  # of log-probabilities; sums in another order differ by less than 0.0001


@dataclass(frozen=True)
class Reference:
    """A greedy answer of `MAX_TOKENS` that was asked for alone."""

    text: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    finish: str | None
    neurons: str


Names = tuple[str, str, str, str]
"""Digest of the mask, path, prompt, level."""

References = Mapping[Names, Reference]


def parts_of(asked: Asked, answer: Answer) -> list[dict[str, Any]]:
    """The JSON of a whole answer, or the events of a complete stream.

    Raises:
        LostError: another status, or a stream that ended with an error or without its end.
    """
    if answer.status != 200:
        raise LostError(f"status {answer.status}, {answer.body[:300]!r}")
    if not asked.stream:
        return [json.loads(answer.body)]
    parts, is_done = events(answer.body)
    if error_of_stream(answer):
        raise LostError(f"a stream ended with {parts[-1]}")
    if not is_done:
        raise LostError(f"a stream was cut: {answer.body[-200:]!r}")
    return parts


def error_of_stream(answer: Answer) -> str | None:
    """The code of the error event that a stream ended with."""
    if not answer.head.headers.get("content-type", "").startswith("text/event-stream"):
        return None
    parts, _ = events(answer.body)
    return str(parts[-1]["error"]["code"]) if parts and "error" in parts[-1] else None


def reference_of(asked: Asked, answer: Answer) -> Reference:
    """What later answers are held to. `asked` is greedy, with log-probabilities."""
    said = choices(parts_of(asked, answer))[0]
    neurons = answer.head.headers["x-safety-neurons"]
    return Reference(said.text, tuple(said.tokens), tuple(said.logprobs), said.finish, neurons)


def names_of(asked: Asked, answer: Answer) -> Names:
    """Which reference an answer is held to: that of the mask that it names."""
    return answer.head.headers["x-safety-mask"], asked.path, asked.prompt, asked.level or DEFAULT


def judged(asked: Asked, answer: Answer, references: References) -> tuple[int, float]:
    """The number of tokens of an answer that is as promised, and the largest deviation of their
    log-probabilities from the reference's.

    Raises:
        LostError: it is not.
    """
    parts = parts_of(asked, answer)
    reference = references.get(names_of(asked, answer))
    if reference is None:
        raise LostError(f"no mask of ours was applied: {names_of(asked, answer)}")
    applied = answer.head.headers["x-safety-level"], answer.head.headers["x-safety-neurons"]
    if applied != (asked.level or DEFAULT, reference.neurons):
        raise LostError(f"{applied} applied, {asked.level or DEFAULT} ({reference.neurons}) asked for")
    if not parts[0]["system_fingerprint"].endswith(answer.head.headers["x-safety-mask"]):
        raise LostError(f"fingerprint {parts[0]['system_fingerprint']} is of another mask")
    said = choices(parts)
    if sorted(said) != list(range(asked.num_choices)):
        raise LostError(f"choices {sorted(said)} of {asked.num_choices} arrived")
    deviation = max(_check(asked, one, reference) for one in said.values())
    counted = int(parts[-1]["usage"]["completion_tokens"])
    arrived = _num_arrived(asked, said, reference)
    if arrived is not None and arrived != counted:
        raise LostError(f"{arrived} tokens arrived, usage counts {counted}")
    return counted, deviation


def _num_arrived(asked: Asked, said: Mapping[int, Said], reference: Reference) -> int | None:
    if asked.logprobs:
        return sum(len(one.tokens) for one in said.values())
    return len(reference.tokens) * asked.num_choices if asked.greedy else None


def _check(asked: Asked, one: Said, reference: Reference) -> float:
    if one.finish not in ("stop", "length"):
        raise LostError(f"an answer ended with {one.finish!r}: {one}")
    if not asked.greedy:
        return 0.0
    expected = reference.tokens[: asked.num_tokens]
    if asked.logprobs and tuple(one.tokens) != expected:
        raise LostError(f"{asked}: tokens {one.tokens}, alone {expected}")
    is_cut = len(reference.tokens) > asked.num_tokens
    if one.finish != ("length" if is_cut else reference.finish):
        raise LostError(f"{asked}: ended with {one.finish!r}, alone with {reference.finish!r}")
    if asked.num_tokens == MAX_TOKENS and one.text != reference.text:
        raise LostError(f"{asked}: {one.text!r}, alone {reference.text!r}")
    deviation = deviation_of(one.logprobs, reference.logprobs)
    if deviation > MAX_DEVIATION:
        raise LostError(f"{asked}: log-probabilities {one.logprobs}, alone {reference.logprobs}")
    return deviation


def deviation_of(some: Sequence[float], others: Sequence[float]) -> float:
    """The largest difference, as far as both go."""
    return max((abs(one - other) for one, other in zip(some, others, strict=False)), default=0.0)


def differ(one: Reference, other: Reference) -> bool:
    """Whether an answer that is held to the one cannot pass for the other."""
    return one.tokens != other.tokens or deviation_of(one.logprobs, other.logprobs) > 2 * MAX_DEVIATION
