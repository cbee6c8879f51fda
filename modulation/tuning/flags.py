"""Flags of `neurontune tune` that must fit together, in its two forms.

Knows which flag needs which, and the range of their values. Knows nothing of what is done with them.
"""

import math
from collections.abc import Mapping

from modulation.errors import DataError


def refuse_misfits(adapt: bool, learning: Mapping[str, object], adapting: Mapping[str, object]) -> None:
    """Raise DataError for flags that are missing, do not go together, or have values out of range.

    `learning` are the flags of tuning alone, `adapting` those of `--adapt` alone; None: not given.
    """
    for flag in _given(learning if adapt else adapting):
        goes = "does not go with --adapt, which keeps the mask's neurons" if adapt else "needs --adapt"
        raise DataError(f"{flag} {goes}. Leave it out.")
    if adapt:
        _refuse_adapting(adapting)
    else:
        _refuse_learning(learning)


def _refuse_adapting(flags: Mapping[str, object]) -> None:
    if flags["--mask"] is None:
        raise DataError("--mask is missing: --adapt needs the mask that is to be adapted.")
    rate = flags["--rate"]
    if isinstance(rate, float) and not (rate > 0 and math.isfinite(rate)):
        raise DataError(f"--rate {rate:g}: a number above 0 is expected.")


def _refuse_learning(flags: Mapping[str, object]) -> None:
    given = _given(flags)
    if "--scores" not in given:
        raise DataError("--scores is missing: name the file that `neurontune attribute` wrote.")
    if "--validation" in given and "--validation-family" in given:
        raise DataError("--validation-family does not go with --validation, which has its own prompts.")
    counts = [flag for flag in ("--num-safety", "--num-utility") if flag in given]
    if len(counts) == 1:
        raise DataError(f"{counts[0]} is given alone: give both --num-safety and --num-utility.")
    if counts and "--share" in given:
        raise DataError("--share does not go with --num-safety and --num-utility. Leave one out.")
    share = flags["--share"]
    if isinstance(share, float) and not 0 < share <= 1:
        raise DataError(f"--share {share:g}: a share above 0 and up to 1 is expected.")


def _given(flags: Mapping[str, object]) -> list[str]:
    return [flag for flag, value in flags.items() if value is not None]
