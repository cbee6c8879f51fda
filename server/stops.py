"""Texts that end an answer, found also across the borders of tokens, and never let out.

Knows outputs. Knows no engine, no HTTP: closing what is iterated here closes the outputs, which aborts the
request.
"""

from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from server.engines.base import Output, TokenLogprob


class Watch:
    """Lets text pass up to the first of some marks, holding back what may become one."""

    def __init__(self, marks: Sequence[str]) -> None:
        self._marks = marks
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """What may pass now that `text` has come; once a mark is found, nothing more."""
        if self.found is not None:
            return ""
        held = self._held + text
        places = [(place, mark) for mark in self._marks if (place := held.find(mark)) >= 0]
        if places:
            place, self.found = min(places)
            self._held = held[place:]
            return held[:place]
        keep = max((_overlap(held, mark) for mark in self._marks), default=0)
        passed, self._held = held[: len(held) - keep], held[len(held) - keep :]
        return passed

    def rest(self) -> str:
        """What is still held back: the end of a text that holds no mark, or the mark and what followed."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, mark: str) -> int:
    """How long the longest end of `text` is with which `mark` begins."""
    return next(
        (size for size in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:size])), 0
    )


async def until_stop(
    outputs: AsyncGenerator[Output, None], stops: Sequence[str]
) -> AsyncGenerator[Output, None]:
    """`outputs`, one for one, ended with "stop" before the first of `stops`.

    Their counts stay what they were. A token's log-probability passes with the first of its text.
    """
    watch = Watch(stops)
    waiting: deque[tuple[int, TokenLogprob]] = deque()  # where the token's text begins
    num_seen = num_passed = 0
    async with aclosing(outputs):
        async for output in outputs:
            waiting.extend((num_seen, each) for each in output.logprobs)
            num_seen += len(output.text)
            text = watch.push(output.text)
            is_last = output.finish_reason is not None and watch.found is None
            if is_last:
                text += watch.rest()
            num_passed += len(text)
            logprobs = []
            while waiting and (is_last or waiting[0][0] < num_passed):
                logprobs.append(waiting.popleft()[1])
            finish = "stop" if watch.found is not None else output.finish_reason
            yield replace(output, text=text, finish_reason=finish, logprobs=tuple(logprobs))
            if finish is not None:
                return
