"""How long a request may take, its waiting included, and how it ends when that time is over.

Knows seconds, ASGI messages and events. Knows no engine: what still runs is cancelled, and whoever holds an
engine's iterator closes it then.
"""

import asyncio
import json
import math
import re
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.datastructures import Headers
from starlette.types import Message, Scope, Send

from server.errors import DeadlineExceededError, InvalidValueError, error_body

TIMEOUT_HEADER: Final = "X-Request-Timeout"
# A client that does not read would keep its last event, and its request, for ever.
LAST_EVENT_SECONDS: Final = 1.0
# What a client may write for a number; Python reads more as one, `1_0` for example.
_NUMBER: Final = re.compile(r"([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)


def seconds_of(scope: Scope, at_most: float) -> float:
    """The seconds that a request has: those of its header, but never more than `at_most`.

    Raises:
        InvalidValueError: the header is not one number above 0.
    """
    given = Headers(scope=scope).getlist(TIMEOUT_HEADER)
    if not given:
        return at_most
    seconds = float(given[0]) if _NUMBER.fullmatch(given[0]) else math.nan
    if len(set(given)) > 1 or not 0 < seconds < math.inf:
        raise InvalidValueError(
            f"The header {TIMEOUT_HEADER} must be a number of seconds above 0, given once, not "
            f"{', '.join(given)[:60]!r}. More than {at_most:g} count as {at_most:g}.",
            TIMEOUT_HEADER,
        )
    return min(seconds, at_most)


async def within(
    seconds: float,
    send: Send,
    work: Callable[[Send], Awaitable[None]],
    on_expiry: Callable[[Exception], object],
) -> None:
    """Run `work`, which answers by the `send` that it gets, but for `seconds` at most; it is over on return.

    After the first byte of a stream the error is its last event. `on_expiry` is called if the time was over
    before the last one: an answer that is complete is in time, whatever is still tidied up behind it.

    Raises:
        DeadlineExceededError: the time was over before the first byte.
    """
    begun: Message | None = None
    is_complete = False

    async def sending(message: Message) -> None:
        nonlocal begun, is_complete
        begun = begun or message
        await send(message)
        is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)

    try:
        async with asyncio.timeout(seconds) as limit:
            await work(sending)
    except TimeoutError:
        if not limit.expired():
            raise
        if is_complete:
            return
        error = DeadlineExceededError(
            f"This request took longer than its {seconds:g} s, waiting included. Ask for less, or for more "
            f"time with the header {TIMEOUT_HEADER}, up to the server's own limit."
        )
        on_expiry(error)
        if begun is None:
            raise error from None
        await _end_stream(Headers(raw=begun["headers"]), error, send)


async def _end_stream(headers: Headers, error: Exception, send: Send) -> None:
    if not headers.get("content-type", "").startswith("text/event-stream"):
        return
    event = b"data: " + json.dumps(error_body(error), separators=(",", ":")).encode() + b"\n\n"
    try:
        async with asyncio.timeout(LAST_EVENT_SECONDS):
            await send({"type": "http.response.body", "body": event, "more_body": False})
    except TimeoutError:
        pass  # the server closes the connection of an answer that was not completed
