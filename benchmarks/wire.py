"""HTTP/1.1 on one bare connection, so that a client can leave at any byte and knows what has arrived.

Knows heads, bodies and server-sent events. Knows nothing of what is asked.
"""

import asyncio
import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

HOST: Final = "127.0.0.1"
DONE: Final = "[DONE]"
RESET: Final = struct.pack("ii", 1, 0)  # linger for 0 s: what is unsent is thrown away, the peer gets RST


@dataclass(frozen=True)
class Raw:
    """A request as it goes out. `announced`: a content length that is not the body's."""

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    announced: int | None = None
    chunked: bool = False

    def to_bytes(self) -> bytes:
        headers = {"Host": "localhost", **self.headers}
        if self.chunked:
            headers["Transfer-Encoding"] = "chunked"
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(self.body), self.body)
        else:
            headers["Content-Length"] = str(len(self.body) if self.announced is None else self.announced)
            body = self.body
        lines = [f"{self.method} {self.path} HTTP/1.1", *(f"{name}: {of}" for name, of in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass(frozen=True)
class Head:
    """Status and headers of an answer; names are in lower case."""

    status: int
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    head: Head
    body: bytes

    @property
    def status(self) -> int:
        return self.head.status

    @property
    def code(self) -> str | None:
        """The error's code; None where the body holds no error."""
        try:
            return str(json.loads(self.body)["error"]["code"])
        except (ValueError, KeyError, TypeError):
            return None


class Connection:
    """A connection that is opened when it is needed, and kept as long as both sides keep it: one that the
    server has closed meanwhile, as it may after some idle seconds, is opened anew.

    Reading raises EOFError where the server has closed it, sending OSError.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def open(self) -> None:
        if self._streams is not None and self._streams[0].at_eof():
            self.drop()
        if self._streams is None:
            self._streams = await asyncio.open_connection(HOST, self._port)

    async def send(self, data: bytes) -> None:
        await self.open()
        assert self._streams is not None
        self._streams[1].write(data)
        await self._streams[1].drain()

    async def head(self) -> Head:
        assert self._streams is not None
        first, *rest = (await self._streams[0].readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in rest if line)
        return Head(int(first.split()[1]), {name.lower(): of.strip() for name, _, of in pairs})

    async def chunk(self) -> bytes:
        """The next part of a chunked body; empty: the end."""
        assert self._streams is not None
        reader = self._streams[0]
        size = int(await reader.readuntil(b"\r\n"), 16)
        return (await reader.readexactly(size + 2))[:-2]

    async def body(self, head: Head) -> bytes:
        assert self._streams is not None
        if "content-length" in head.headers:
            body = await self._streams[0].readexactly(int(head.headers["content-length"]))
        elif "transfer-encoding" in head.headers:
            parts = []
            while part := await self.chunk():
                parts.append(part)
            body = b"".join(parts)
        else:
            body = await self._streams[0].read()
        if head.headers.get("connection") == "close":
            self.drop()
        return body

    async def ask(self, raw: Raw) -> Answer:
        await self.send(raw.to_bytes())
        head = await self.head()
        return Answer(head, await self.body(head))

    async def until_closed(self) -> bytes:
        """All that the server still sends before it closes."""
        assert self._streams is not None
        return await self._streams[0].read()

    def drop(self, *, reset: bool = False) -> None:
        """Leave, with RST if `reset`. What has been sent has been handed to the kernel."""
        if self._streams is not None:
            writer, self._streams = self._streams[1], None
            if reset:
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            writer.close()


def events(answer: bytes) -> tuple[list[dict[str, Any]], bool]:
    """The events of a stream, and whether it ended with `[DONE]`."""
    lines = [line.removeprefix("data: ") for line in answer.decode().split("\n\n") if line]
    is_done = lines[-1:] == [DONE]
    return [json.loads(line) for line in lines[: -1 if is_done else None]], is_done


@dataclass
class Said:
    """What has arrived of one choice."""

    text: str = ""
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None


def choices(parts: list[dict[str, Any]]) -> dict[int, Said]:
    """What has arrived, by choice, in the events of a stream or in the one body of a whole answer."""
    said: dict[int, Said] = {}
    for choice in (choice for part in parts for choice in part["choices"]):
        one = said.setdefault(choice["index"], Said())
        content = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        one.text += content.get("content") or ""
        found = choice.get("logprobs") or {}
        chat = found.get("content") or ()
        one.tokens += found.get("tokens") or [each["token"] for each in chat]
        one.logprobs += found.get("token_logprobs") or [each["logprob"] for each in chat]
        one.finish = choice.get("finish_reason") or one.finish
    return said
