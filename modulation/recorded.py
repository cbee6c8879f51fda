"""What a mask's own recorded evaluation says of its levels: whether they may be served.

Knows a mask's metadata. Knows nothing of models or of how a level is measured.
"""

from itertools import pairwise
from typing import Any, Final

from modulation.errors import MaskFormatError, UnsafeMaskError
from modulation.levels import BALANCED, OFF, SECURITY_CRITICAL, UTILITY_PRIORITY
from modulation.masks import Mask

_FROM_SAFEST: Final = (SECURITY_CRITICAL, BALANCED, UTILITY_PRIORITY)


def recorded_asr(mask: Mask) -> dict[str, float]:
    """Attack success rate, 0 to 1, of every level that the mask's evaluation has one for, `off` among them.

    Raises MaskFormatError for an evaluation whose rates are no numbers.
    """
    try:
        levels = mask.metadata.evaluation.get("levels", {})
        return {name: _rate(metrics["asr"]["rate"]) for name, metrics in levels.items() if "asr" in metrics}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise MaskFormatError(f"The evaluation that the mask records cannot be read ({error!r}).") from error


def _rate(given: Any) -> float:
    rate = float(given)
    if not 0 <= rate <= 1:  # NaN neither
        raise ValueError(f"{rate} is no rate: accepted are 0 to 1")
    return rate


def refuse_less_safe(mask: Mask) -> None:
    """Refuse a mask one of whose levels is less safe than `off`, or than a level that is named as less safe.

    Factors can remove refusals as well as strengthen them: a mask file could turn a level's name into its
    opposite. What the mask does not record is not judged.

    Raises:
        UnsafeMaskError: by its own recorded evaluation, attacks succeed more often than they may.
        MaskFormatError: the evaluation cannot be read.
    """
    asr = recorded_asr(mask)
    if OFF in asr:
        for name in mask.levels.names:
            if name in asr and asr[name] > asr[OFF]:
                raise _unsafe(name, asr[name], OFF, asr[OFF])
    for safer, less_safe in pairwise([name for name in _FROM_SAFEST if name in asr and name in mask.levels]):
        if asr[safer] > asr[less_safe]:
            raise _unsafe(safer, asr[safer], less_safe, asr[less_safe])


def _unsafe(name: str, asr: float, other: str, other_asr: float) -> UnsafeMaskError:
    return UnsafeMaskError(
        f"Level {name!r} is less safe than {other!r} on the mask's own recorded evaluation: {asr:.1%} of "
        f"attacks succeed against {other_asr:.1%}. Make levels anew with `neurontune levels`, or accept it "
        "with the setting allow_less_safe_levels."
    )
