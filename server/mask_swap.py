"""Another mask while the server runs: which files may be one, and what is checked before it is in force.

Knows mask files and the folder that they must be in. Knows no HTTP, no keys, and of the engine only how it
puts a mask in force.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from modulation.errors import NeuronTuneError
from modulation.levels import SafetyLevels
from server.engines.base import EngineInfo
from server.errors import InvalidMaskError

if TYPE_CHECKING:
    from modulation.masks import Mask

LOAD_SECONDS: Final = 120.0

UseMask = Callable[["Mask"], Awaitable[EngineInfo]]
CheckLevels = Callable[[SafetyLevels], None]
"""Raises a NeuronTuneError where what the server has promised is not in these levels."""


class MaskSwap:
    """Puts mask files from `folder` in force, one after another; `file` is the one that a reload reads.

    `file` None: there is none to be read again; `digest` is of what was read from it last. `on_swap`
    is told of every mask put in force, or of why it was not.
    """

    def __init__(
        self,
        folder: Path,
        file: Path | None,
        use: UseMask,
        check: CheckLevels,
        on_swap: Callable[[Exception | None, str], object] = lambda _error, _file: None,
        digest: str | None = None,
    ) -> None:
        self._folder: Final = folder
        self._file: Final = file
        self._use: Final = use
        self._check: Final = check
        self._on_swap: Final = on_swap
        self._digest = digest
        self._one_by_one: Final = asyncio.Lock()

    async def swap(self, path: str) -> EngineInfo:
        """Put the mask in the file `path` in force, and say what is served then. `path` is in the folder,
        or relative to it; links are followed before that is decided.

        Raises:
            InvalidMaskError: it cannot be; the mask in force stays.
        """
        try:
            folder, file = self._folder.resolve(), (self._folder / path).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise InvalidMaskError(f"{path[:200]!r} is no path of a file: {error}.", "path") from error
        if not file.is_relative_to(folder):
            raise InvalidMaskError(
                f"{path[:200]!r} is not in the folder that masks are taken from, {folder}. Put the file "
                "there, or start the server with another mask_dir.",
                "path",
            )
        info = await self._put_in_force(file)
        assert info is not None
        return info

    async def reload(self) -> None:
        """Read the file again that was named at the start; one that cannot be used changes nothing, and
        neither does one that has not changed: a mask put in force since then stays."""
        if self._file is None:
            return
        log = logging.getLogger(__name__)
        try:
            info = await self._put_in_force(self._file, unless=self._digest)
        except InvalidMaskError as error:
            log.error("The mask was not reloaded, the old one stays in force. %s", error)
            return
        if info is None:
            log.info("The mask file %s has not changed; the mask in force stays.", self._file)
            return
        self._digest = info.mask_digest
        log.info("The mask in force is %s, from %s.", info.mask_digest, self._file)

    async def _put_in_force(self, file: Path, unless: str | None = None) -> EngineInfo | None:
        """What is served then; None, and nothing done, for a mask whose digest is `unless`."""
        async with self._one_by_one:
            try:
                async with asyncio.timeout(LOAD_SECONDS):
                    mask = await asyncio.to_thread(_load, file)
                if mask.digest == unless:
                    return None
                self._check(mask.levels)
                info = await self._use(mask)
            except Exception as error:  # whatever a file makes fail, the server goes on with the old mask
                self._on_swap(error, str(file))
                raise InvalidMaskError(
                    f"This mask cannot be put in force, the old one stays: {_reason(error)}", "path"
                ) from error
            self._on_swap(None, f"{info.mask_digest} from {file}")
            return info


def _reason(error: Exception) -> str:
    if isinstance(error, NeuronTuneError):
        return str(error)
    if isinstance(error, TimeoutError):
        return f"its file could not be read within {LOAD_SECONDS:g} s."
    logging.getLogger(__name__).error("A mask could not be put in force.", exc_info=error)
    return f"it makes the server fail ({type(error).__name__}); the cause is in its log."


def _load(file: Path) -> "Mask":
    from modulation.masks import Mask  # brings numbers that the HTTP side does without

    return Mask.load(file)
