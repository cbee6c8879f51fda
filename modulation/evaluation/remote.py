"""Conversations to replies, through any server that speaks OpenAI's chat API.

Knows addresses, HTTP failures and how many requests run at once; retries with growing pauses are the
client library's. Knows nothing of records, judges or files. Imports `openai` when a server is asked.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from modulation.errors import RemoteError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

LEVEL_HEADER: Final = "X-Safety-Level"
NO_KEY: Final = "not-needed"
MAX_CHARACTERS_SHOWN: Final = 300
HINTS: Final = {
    400: "The server does not accept this prompt, model or level.",
    401: "The key is read from the variable {key_variable}.",
    403: "The key is read from the variable {key_variable}.",
    404: "Does the address end as the server's API does, mostly in /v1, and is the model served there?",
    429: "Lower --concurrency, or raise --retries.",
}

Conversation = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Endpoint:
    """A server and how to ask it. `key_variable` is where the key came from, for errors."""

    url: str
    model: str
    api_key: str = NO_KEY
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout_seconds: float = 120.0
    max_retries: int = 5


@dataclass(frozen=True)
class Reply:
    """What a server answered, and the level that it says it applied, if it says so."""

    text: str
    level: str | None


@dataclass(frozen=True)
class ServerLevels:
    """What a server lists at `/safety-levels`: its levels and the digest of its mask; it may list none."""

    names: tuple[str, ...] = ()
    mask: str | None = None


OnReply = Callable[[int, Reply], object]
"""Told the row of a conversation and its reply, as soon as it is there, in any order."""


def user(prompt: str) -> Conversation:
    """A conversation of one message."""
    return [{"role": "user", "content": prompt}]


def ask(
    endpoint: Endpoint,
    conversations: Sequence[Conversation],
    max_tokens: int,
    level: str | None = None,
    on_reply: OnReply = lambda _row, _reply: None,
) -> list[Reply]:
    """The replies, in the order of the conversations, at temperature 0; `level` goes into a header.

    Raises RemoteError, at the first request that fails for good, with the address, the status and what
    was answered; the others are cancelled then, as they are on Ctrl-C.
    """
    refuse_missing_package()
    return asyncio.run(_ask_all(endpoint, conversations, max_tokens, level, on_reply))


def listed_levels(endpoint: Endpoint) -> ServerLevels:
    """What the server lists at `/safety-levels`; empty where it has no such list.

    Raises RemoteError when the server cannot be reached, fails, or refuses the key.
    """
    found = asyncio.run(_got(endpoint, "/safety-levels"))
    try:
        return ServerLevels(tuple(str(level["id"]) for level in found["data"]), found["mask"])
    except (LookupError, TypeError):
        return ServerLevels()


def refuse_unreachable(endpoint: Endpoint) -> None:
    """Raise RemoteError when the server cannot be reached, fails, or refuses the key."""
    asyncio.run(_got(endpoint, "/models"))


def refuse_missing_package() -> None:
    """Raise RemoteError with the command that installs what asking a server needs."""
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise RemoteError(
            "Asking a server needs the package openai, which is not installed: "
            "pip install 'neurontune[evaluation]'"
        ) from error


async def _ask_all(
    endpoint: Endpoint,
    conversations: Sequence[Conversation],
    max_tokens: int,
    level: str | None,
    on_reply: OnReply,
) -> list[Reply]:
    waiting = iter(enumerate(conversations))
    replies: dict[int, Reply] = {}

    async def work(client: "AsyncOpenAI") -> None:
        for row, messages in waiting:
            replies[row] = await _ask(client, endpoint, messages, max_tokens, level)
            on_reply(row, replies[row])

    async with _client(endpoint) as client:
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(endpoint.concurrency, len(conversations))):
                    workers.create_task(work(client))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
    return [replies[row] for row in range(len(conversations))]


def _client(endpoint: Endpoint) -> "AsyncOpenAI":
    from openai import AsyncOpenAI

    return AsyncOpenAI(
        base_url=endpoint.url,
        api_key=endpoint.api_key,
        timeout=endpoint.timeout_seconds,
        max_retries=endpoint.max_retries,
    )


async def _ask(
    client: "AsyncOpenAI",
    endpoint: Endpoint,
    messages: Conversation,
    max_tokens: int,
    level: str | None,
) -> Reply:
    import openai

    create: Any = client.chat.completions.with_raw_response.create
    try:
        response = await create(
            model=endpoint.model,
            messages=list(messages),
            temperature=0,
            max_tokens=max_tokens,
            extra_headers={} if level is None else {LEVEL_HEADER: level},
        )
    except openai.APIError as error:
        raise _failure(endpoint, error, f" The prompt began {messages[-1]['content'][:60]!r}.") from error
    applied = response.headers.get(LEVEL_HEADER)
    if level is not None and applied not in (None, level):
        raise RemoteError(
            f"{endpoint.url} was asked for the safety level {level!r} and answered at {applied!r}: "
            "these answers would be counted at the wrong level."
        )
    return Reply(_content(endpoint, response.http_response.text), applied)


def _content(endpoint: Endpoint, body: str) -> str:
    """The message's text; where it has none, the refusal that OpenAI's API may carry apart."""
    try:
        message = json.loads(body)["choices"][0]["message"]
        return str.strip(message.get("content") or message.get("refusal") or "")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RemoteError(
            f"{endpoint.url} answered something that is not a chat completion: {_shortened(body)}"
        ) from error


async def _got(endpoint: Endpoint, path: str) -> Any:
    """What the server answers to GET, without a second try; None where it does not know the path."""
    refuse_missing_package()
    import openai

    async with _client(endpoint) as client:
        try:
            return await client.with_options(max_retries=0).get(path, cast_to=object)
        except openai.APIStatusError as error:
            if error.status_code in (401, 403) or error.status_code >= 500:
                raise _failure(endpoint, error) from error
            return None
        except openai.APIError as error:
            raise _failure(endpoint, error) from error
        except ValueError:  # says it is JSON, and is not
            return None


def _failure(endpoint: Endpoint, error: Exception, about: str = "") -> RemoteError:
    import openai

    if isinstance(error, openai.APITimeoutError):
        return RemoteError(
            f"{endpoint.url} did not answer within {endpoint.timeout_seconds:g} seconds, "
            f"tried {endpoint.max_retries + 1} times. Raise --timeout, or lower --concurrency."
        )
    if isinstance(error, openai.APIStatusError):
        hint = HINTS.get(error.status_code, "Its log may say more.")
        answered = _shortened(error.response.text) or "nothing"
        return RemoteError(
            f"{endpoint.url} answered with status {error.status_code}: {answered}. "
            f"{hint.format(key_variable=endpoint.key_variable)}{about}"
        )
    reason = error.__cause__ or error
    return RemoteError(f"{endpoint.url} cannot be reached: {reason}. Is the server running there?")


def _shortened(text: str) -> str:
    """The beginning of what a server answered, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_CHARACTERS_SHOWN else f"{line[:MAX_CHARACTERS_SHOWN]}..."
