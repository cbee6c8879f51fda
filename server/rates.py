"""How many requests and tokens a caller may have per minute.

Knows callers and the headers that OpenAI's clients read. Knows no route, no engine. Windows are fixed: a
minute begins with the first request after the last one has ended, so that across the edge of two windows
up to twice the rate can pass. Tokens are charged when they are known, so the last answers of a window can
exceed it; what is over is forgiven with the window.
"""

import math
import time
from collections.abc import Mapping
from typing import Final

from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter

from server.callers import Caller
from server.errors import InvalidValueError, RateLimitError

REQUESTS: Final = "requests"
TOKENS: Final = "tokens"
RATE_HEADERS: Final = tuple(
    f"x-ratelimit-{told}-{what}" for what in (REQUESTS, TOKENS) for told in ("limit", "remaining", "reset")
)


class Rates:
    """What every caller has used of its minute, by the caller's name."""

    def __init__(self) -> None:
        self._used: Final = FixedWindowRateLimiter(MemoryStorage())

    async def admit(self, caller: Caller) -> None:
        """Count one request. A refused one does not count.

        Raises:
            RateLimitError: the caller has no request or no token left in this minute.
        """
        limits = _limits(caller)
        for what, item in limits.items():
            await self._refuse_beyond(what, item, caller, cost=1)
        if REQUESTS in limits:
            await self._used.hit(limits[REQUESTS], caller.name)

    async def charge_prompt(self, caller: Caller, num_tokens: int) -> None:
        """Charge about what a request's prompts have, before anything is generated.

        Raises:
            RateLimitError: they are more than the caller has left in this minute.
            InvalidValueError: they are more than the caller ever has.
        """
        item = _limits(caller).get(TOKENS)
        if item is not None:
            await self._refuse_beyond(TOKENS, item, caller, cost=num_tokens)
            await self._used.hit(item, caller.name, cost=num_tokens)

    async def charge_rest(self, caller: Caller, num_tokens: int) -> None:
        """Charge what has been used beyond that, whether it is left or not."""
        item = _limits(caller).get(TOKENS)
        if item is not None and num_tokens > 0:
            await self._used.hit(item, caller.name, cost=num_tokens)

    async def headers(self, caller: Caller) -> Mapping[str, str]:
        """What a caller has left, under the names that OpenAI has for it; empty for one without limits."""
        found: dict[str, str] = {}
        for what, item in _limits(caller).items():
            reset, remaining = await self._used.get_window_stats(item, caller.name)
            found |= {
                f"x-ratelimit-limit-{what}": str(item.amount),
                f"x-ratelimit-remaining-{what}": str(remaining),
                f"x-ratelimit-reset-{what}": f"{max(0.0, reset - time.time()):.3f}s",
            }
        return found

    async def _refuse_beyond(self, what: str, item: RateLimitItem, caller: Caller, cost: int) -> None:
        if await self._used.test(item, caller.name, cost=cost):
            return
        if cost > item.amount:
            raise InvalidValueError(
                f"The key {caller.name!r} has {item.amount} {what} per minute, and this request needs about "
                f"{cost}: it never fits. Shorten it."
            )
        reset, remaining = await self._used.get_window_stats(item, caller.name)
        seconds = max(1, math.ceil(reset - time.time()))
        raise RateLimitError(
            f"The key {caller.name!r} has {remaining} of {item.amount} {what} per minute left; this request "
            f"needs {'about ' if what == TOKENS else ''}{cost}. Try again in {seconds} s.",
            seconds,
            await self.headers(caller),
        )


def _limits(caller: Caller) -> dict[str, RateLimitItem]:
    rates = {REQUESTS: caller.requests_per_minute, TOKENS: caller.tokens_per_minute}
    return {
        what: RateLimitItemPerMinute(rate, namespace=what) for what, rate in rates.items() if rate is not None
    }
