"""How many requests may be inside at once, and how much of their prompts may wait.

Knows places, tokens and how fast places became free. Knows no HTTP, no engine, no caller: what it gives
is a `with`, and what it cannot give it refuses at once.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from server.engines.base import Chat, Prompt
from server.errors import InvalidValueError, OverloadedError

NUM_REMEMBERED: Final = 64
MAX_RETRY_SECONDS: Final = 60
CHARACTERS_PER_TOKEN: Final = 4
TOKENS_PER_MESSAGE: Final = 4


class Admission:
    """Places for `max_num_running` answers that are generated and `max_num_waiting` that wait.

    `max_waiting_tokens` bounds the prompts of answers that have not begun, in estimated tokens; one
    request alone may exceed it, or it could never be answered.
    """

    def __init__(
        self,
        max_num_running: int,
        max_num_waiting: int,
        max_waiting_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_places: Final = max_num_running + max_num_waiting
        self.num_taken = 0
        self.num_waiting_tokens = 0
        self._max_num_running: Final = max_num_running
        self._max_waiting_tokens: Final = max_waiting_tokens
        self._clock: Final = clock
        self._freed: Final[deque[float]] = deque(maxlen=NUM_REMEMBERED)

    @contextmanager
    def seat(self) -> Iterator["Seat"]:
        """One place, and what its holder takes besides; all of it is free again at the end.

        Raises:
            OverloadedError: no place is free.
        """
        seat = Seat(self)
        self._take(1)
        try:
            yield seat
        finally:
            seat.free()

    def _take(self, number: int) -> None:
        if self.num_taken + number > self.num_places:
            raise self._overloaded(
                f"{self.num_taken} of {self.num_places} places for answers are taken and {number} more "
                "cannot be given"
            )
        self.num_taken += number

    def _take_tokens(self, number: int) -> None:
        if self.num_waiting_tokens and self.num_waiting_tokens + number > self._max_waiting_tokens:
            raise self._overloaded(
                f"prompts of about {self.num_waiting_tokens} tokens wait already, {number} more would exceed "
                f"{self._max_waiting_tokens}"
            )
        self.num_waiting_tokens += number

    def _give_back(self, num_places: int, num_tokens: int) -> None:
        self.num_taken -= num_places
        self.num_waiting_tokens -= num_tokens
        assert self.num_taken >= 0 and self.num_waiting_tokens >= 0, (self.num_taken, self.num_waiting_tokens)
        self._freed.extend([self._clock()] * num_places)

    def _overloaded(self, reason: str) -> OverloadedError:
        seconds = self.retry_seconds()
        return OverloadedError(
            f"The server is full: {reason}. Try again in {seconds} s (Retry-After).", seconds
        )

    def retry_seconds(self) -> int:
        """By when half of those who wait now will probably have been let in: 1 to 60 seconds."""
        if len(self._freed) < 2:
            return 1
        seconds_per_place = (self._clock() - self._freed[0]) / len(self._freed)
        num_waiting = max(0, self.num_taken - self._max_num_running)
        return min(MAX_RETRY_SECONDS, max(1, math.ceil(seconds_per_place * num_waiting / 2)))


class Seat:
    """What one request holds: places, and tokens of prompts that wait."""

    def __init__(self, admission: Admission) -> None:
        self._admission: Final = admission
        self._num_places = 1
        self._num_tokens = 0

    def take(self, num_tokens: Sequence[int]) -> None:
        """Hold one place for each answer (one is held already), and that many tokens of its prompt.

        Raises:
            OverloadedError: there is no room now.
            InvalidValueError: there never is: more answers than places.
        """
        number = len(num_tokens)
        if number > self._admission.num_places:
            raise InvalidValueError(
                f"{number} answers at once are more than this server ever has places for, "
                f"{self._admission.num_places}. Ask for fewer at once.",
                "n",
            )
        self._admission._take(number - self._num_places)
        self._num_places = number
        self._admission._take_tokens(sum(num_tokens))
        self._num_tokens += sum(num_tokens)

    def begun(self, num_tokens: int) -> None:
        """An answer has begun: its prompt waits no longer."""
        self._num_tokens -= num_tokens
        self._admission._give_back(0, num_tokens)

    def free(self) -> None:
        """Give everything back. Once."""
        self._admission._give_back(self._num_places, self._num_tokens)
        self._num_places = self._num_tokens = 0


def estimated_tokens(prompt: Prompt, at_most: int) -> int:
    """About how many tokens a prompt has, without reading it as the model does: 1 to `at_most`.

    Tokens count as they are, text as one token for every four characters, and four for each message.
    """
    if isinstance(prompt, Chat):
        texts = [message.content for message in prompt.messages]
        texts += [repr(message.tool_calls) for message in prompt.messages if message.tool_calls]
        texts += [repr(tool) for tool in prompt.tools]
        number = sum(TOKENS_PER_MESSAGE + len(text) // CHARACTERS_PER_TOKEN for text in texts)
    else:
        number = len(prompt) // CHARACTERS_PER_TOKEN if isinstance(prompt, str) else len(prompt)
    return max(1, min(number, at_most))
