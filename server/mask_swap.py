"""Another mask while the server runs: which files may be one, and what is checked before it is in force.

Knows mask files and the folder that they must be in. Knows no HTTP, no keys, and of the engine only how it
puts a mask in force.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from modulation.errors import NeuronTuneError
from modulation.levels import SafetyLevels
from server.engines.base import EngineInfo
from server.errors import InvalidMaskError

if TYPE_CHECKING:
    from modulation.masks import Mask

LOAD_SECONDS: Final = 120.0
MAX_SHOWN: Final = 200
NOT_RELOADED: Final = "The mask was not reloaded, the old one stays in force. %s"

UseMask = Callable[["Mask"], Awaitable[EngineInfo]]
CheckLevels = Callable[[SafetyLevels], None]
"""Raises a NeuronTuneError where what the server has promised is not in these levels."""


@dataclass(frozen=True, slots=True)
class Swap:
    """What became of one file: `error` None: it is in force. `new` is the digest of the mask in it, None
    where it could not be read; `old` of the one in force before. `by` is who asked for it, as given."""

    file: str
    old: str
    new: str | None = None
    error: BaseException | None = None
    by: object = None


class MaskSwap:
    """Puts mask files from `folder` in force, one after another; `file` is the one that a reload reads.

    `file` None: there is none to be read again. `in_force` tells the digest of the mask in force; at the
    start it is the one in `file`. `on_swap` is told of every file that was to be put in force.

    Hold `changing` for what must not happen meanwhile: while a mask is checked against anything, and until it
    is in force.
    """

    def __init__(
        self,
        folder: Path,
        file: Path | None,
        use: UseMask,
        check: CheckLevels,
        in_force: Callable[[], str],
        on_swap: Callable[[Swap], object] = lambda _swap: None,
    ) -> None:
        self._folder: Final = folder
        self._file: Final = file
        self._use: Final = use
        self._check: Final = check
        self._in_force: Final = in_force
        self._on_swap: Final = on_swap
        self._digest = in_force()
        self.changing: Final = asyncio.Lock()

    async def swap(self, path: str, by: object = None) -> tuple[str, EngineInfo]:
        """Put the mask in the file `path` in force; give the digest of the one before, and what is served.
        `path` is in the folder, or relative to it; links are followed before that is decided.

        Raises:
            InvalidMaskError: it cannot be; the mask in force stays.
        """
        async with self.changing:
            begun = Swap(path[:MAX_SHOWN], self._in_force(), by=by)
            with self._telling(begun):
                mask = await _loaded(self._inside(path))
            return begun.old, await self._put_in_force(mask, begun, self._check)

    async def read_again(self) -> "Mask | None":
        """The mask in the file that was named at the start, for `reload`; None where there is no such file,
        where it has not changed since it was in force (a mask put in force since then stays), or where it
        cannot be read. Hold `changing`."""
        if self._file is None:
            return None
        log = logging.getLogger(__name__)
        try:
            with self._telling(Swap(str(self._file), self._in_force())):
                mask = await _loaded(self._file)
        except InvalidMaskError as error:
            log.error(NOT_RELOADED, error)
            return None
        if mask.digest == self._digest:
            log.info("The mask file %s has not changed; the mask in force stays.", self._file)
            return None
        return mask

    async def reload(
        self, mask: "Mask", check: CheckLevels | None = None, then: Callable[[], object] = int
    ) -> bool:
        """Put what `read_again` gave in force, if `check` lets it pass, and call `then` before anybody else
        can ask for anything. Whether it is in force now. Hold `changing`."""
        log, begun = logging.getLogger(__name__), Swap(str(self._file), self._in_force())
        try:
            await self._put_in_force(mask, begun, check or self._check, then)
        except InvalidMaskError as error:
            log.error(NOT_RELOADED, error)
            return False
        self._digest = mask.digest
        log.info("The mask in force is %s, from %s.", mask.digest, self._file)
        return True

    async def _put_in_force(
        self, mask: "Mask", begun: Swap, check: CheckLevels, then: Callable[[], object] = int
    ) -> EngineInfo:
        begun = replace(begun, new=mask.digest)
        with self._telling(begun):
            check(mask.levels)
            info = await self._use(mask)
            then()
        self._on_swap(begun)
        return info

    def _inside(self, path: str) -> Path:
        try:
            folder, file = self._folder.resolve(), (self._folder / path).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise InvalidMaskError(f"{path[:MAX_SHOWN]!r} is no path of a file: {error}.", "path") from error
        if not file.is_relative_to(folder):
            raise InvalidMaskError(
                f"{path[:MAX_SHOWN]!r} is not in the folder that masks are taken from, {folder}. Put the "
                "file there, or start the server with another mask_dir.",
                "path",
            )
        return file

    @contextmanager
    def _telling(self, begun: Swap) -> Iterator[None]:
        """Whatever ends the block is told; whatever it is, the server goes on with the old mask."""
        try:
            yield
        except BaseException as error:
            self._on_swap(replace(begun, error=error))
            if isinstance(error, InvalidMaskError) or not isinstance(error, Exception):
                raise
            raise InvalidMaskError(
                f"This mask cannot be put in force, the old one stays: {_reason(error)}", "path"
            ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, NeuronTuneError):
        return str(error)
    if isinstance(error, TimeoutError):
        return f"its file could not be read within {LOAD_SECONDS:g} s."
    logging.getLogger(__name__).error("A mask could not be put in force.", exc_info=error)
    return f"it makes the server fail ({type(error).__name__}); the cause is in its log."


async def _loaded(file: Path) -> "Mask":
    async with asyncio.timeout(LOAD_SECONDS):
        return await asyncio.to_thread(_load, file)


def _load(file: Path) -> "Mask":
    from modulation.masks import Mask  # brings numbers that the HTTP side does without

    return Mask.load(file)
