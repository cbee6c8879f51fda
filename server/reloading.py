"""SIGHUP: the audit log's file, the key file and the mask file, read again.

Knows in which order, and what is put in force together. Knows no HTTP and no file's contents.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from modulation.errors import NeuronTuneError
from modulation.levels import SafetyLevels
from server.audit import reload_record
from server.audit_log import AuditLog
from server.callers import Caller
from server.errors import SettingsError
from server.keys import Keyring, Keys, callers_in
from server.mask_swap import MaskSwap

Check = Callable[[SafetyLevels, Sequence[Caller]], None]
"""Raises a NeuronTuneError where the server's default level, or what a caller has, is not in these levels."""


class Reloading:
    """Puts in force what has changed in the key file and in the mask file, and goes on with the audit log in
    a new file if the old one was moved away. `keyring`, `audit` None: there is none.

    Keys that fit the new mask are put in force with it, at one moment, or not with it. Else, and if that mask
    cannot be used, each is tried for itself, and what cannot be used changes nothing: a bad mask keeps no
    revoked key alive.
    """

    def __init__(self, keyring: Keyring | None, swap: MaskSwap, check: Check, audit: AuditLog | None) -> None:
        self._keyring: Final = keyring
        self._swap: Final = swap
        self._check: Final = check
        self._audit: Final = audit

    async def __call__(self) -> None:
        if self._audit is not None:
            self._audit.reopen()
        async with self._swap.changing:
            keys, mask = await self._read_keys(), await self._swap.read_again()
            if keys is not None and mask is not None and self._fits(mask.levels, keys):
                check = partial(self._check_with, callers_in(keys))
                if await self._swap.reload(mask, check, partial(self._use, keys)):
                    return
                mask = None
            if keys is not None:
                self._use(keys)
            if mask is not None:
                await self._swap.reload(mask)

    def _check_with(self, callers: Sequence[Caller], levels: SafetyLevels) -> None:
        self._check(levels, callers)

    def _fits(self, levels: SafetyLevels, keys: Keys) -> bool:
        try:
            self._check(levels, callers_in(keys))
        except NeuronTuneError:
            return False
        return True

    async def _read_keys(self) -> Keys | None:
        if self._keyring is None:
            return None
        try:
            return await asyncio.to_thread(self._keyring.read)
        except SettingsError as error:
            self._tell(error)
            return None

    def _use(self, keys: Keys) -> None:
        assert self._keyring is not None
        try:
            self._keyring.use(keys)
        except SettingsError as error:
            self._tell(error)
        else:
            self._tell(None, len(keys))

    def _tell(self, error: SettingsError | None, number: int = 0) -> None:
        log = logging.getLogger(__name__)
        if error is None:
            log.info("The keys were reloaded: %d.", number)
        else:
            log.error("The keys were not reloaded, the old ones stay in force. %s", error)
        if self._audit is not None:
            self._audit.write(reload_record("keys", error, f"{number} keys"))
