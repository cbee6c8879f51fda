"""The table of attribution methods, and their options from text.

Knows which methods there are and that their options are keyword-only parameters. Knows no method.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from modulation.attribution.attack_aware import attack_aware
from modulation.attribution.base import Attribution
from modulation.attribution.contrast import contrast
from modulation.attribution.contrastive_pairs import contrastive_pairs
from modulation.attribution.random_scores import random_scores
from modulation.attribution.set_difference import set_difference
from modulation.errors import DataError

METHODS: Final[dict[str, Attribution]] = {
    "attack_aware": attack_aware,
    "contrast": contrast,
    "contrastive_pairs": contrastive_pairs,
    "set_difference": set_difference,
    "random": random_scores,
}
DEFAULT_METHOD: Final = "attack_aware"

Options = dict[str, Any]


def default_options(method: str) -> Options:
    """The options of a method with their defaults. Raises DataError for an unknown method."""
    if method not in METHODS:
        raise DataError(f"Method {method!r} is unknown; accepted: {', '.join(METHODS)}.")
    parameters = inspect.signature(METHODS[method]).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def parse_options(method: str, given: Sequence[str], seed: int = 0) -> Options:
    """All options of `method`: its defaults with `given` ("key=value") in their place.

    A method that draws numbers gets `seed`, which is not an option of its own.
    Raises DataError that names the option, the value and what is accepted.
    """
    options = default_options(method)
    accepted = [name for name in options if name != "seed"]
    seen: set[str] = set()
    for each in given:
        name, separator, text = each.partition("=")
        if not separator:
            raise DataError(f"Option {each!r} has no '='; options are written key=value.")
        if name not in accepted:
            known = ", ".join(accepted) or "none"
            raise DataError(f"Option {name!r} is unknown to method {method!r}; accepted: {known}.")
        if name in seen:
            raise DataError(f"Option {name!r} is given twice.")
        seen.add(name)
        options[name] = _value(name, text, type(options[name]))
    return options | ({"seed": seed} if "seed" in options else {})


def with_options(method: str, options: Mapping[str, Any]) -> Attribution:
    """A method whose options are bound."""
    default_options(method)
    return partial(METHODS[method], **options)


def _value(name: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text not in ("true", "false"):
            raise DataError(f"Option {name}={text!r}: true or false is expected.")
        return text == "true"
    if kind is str:
        return text
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        expected = "a whole number" if kind is int else "a number"
        raise DataError(f"Option {name}={text!r}: {expected} is expected.")
    return value
