"""Flags of `neurontune evaluate` that must fit together, and those that name a server.

Knows which flag needs which. Knows nothing of what is done with them.
"""

import os
from collections.abc import Mapping
from typing import Any, Final

from modulation.errors import DataError
from modulation.evaluation.remote import NO_KEY, Endpoint

KEY_VARIABLE: Final = "OPENAI_API_KEY"


def refuse_misfits(
    url: str,
    judge_url: str,
    *,
    in_process: Mapping[str, object],
    server: Mapping[str, object],
    judge: Mapping[str, object],
    either: Mapping[str, object],
) -> None:
    """Raise DataError for a flag that was given (is not None) and would do nothing.

    `in_process` flags go without a `url`, `server` flags with one, `judge` flags with a `judge_url`,
    those of `either` with one of the two.
    """
    if url:
        for flag in given(in_process):
            raise DataError(f"{flag} does not go with --url, where the server has its own. Leave one out.")
    else:
        _refuse("--url", server)
    if not judge_url:
        _refuse("--judge-url", judge)
    if not url and not judge_url:
        _refuse("--url or --judge-url", either)


def _refuse(needed: str, flags: Mapping[str, object]) -> None:
    for flag in given(flags):
        raise DataError(f"{flag} needs {needed}: without a server to ask it would do nothing.")


def given(flags: Mapping[str, object]) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in flags.items() if value is not None}


def endpoint_of(
    flag: str, url: str, model: str, key_flag: str, variable: str | None, asking: Mapping[str, Any]
) -> Endpoint:
    """The server behind `url`, its key taken from the environment.

    Raises DataError for what is no address, and for a variable that was named and is not set.
    """
    if not url.startswith(("http://", "https://")):
        raise DataError(f"{flag} {url!r} is no address; http://HOST:PORT/v1 or https://HOST/v1 is expected.")
    key = os.environ.get(variable or KEY_VARIABLE, "")
    if not key and variable is not None:
        raise DataError(f"{key_flag} {variable}: this variable is not set, or is empty.")
    return Endpoint(url.rstrip("/"), model, key or NO_KEY, variable or KEY_VARIABLE, **asking)
