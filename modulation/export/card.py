"""The model card of an export: what it is, of which mask and model, what was measured, what to mind.

Knows masks, levels and Markdown. Knows no torch and no format.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import yaml

from modulation.export.choice import recorded_rates
from modulation.levels import OFF, ZERO, SafetyLevel
from modulation.profiles import METRICS, profile_of

if TYPE_CHECKING:
    from modulation.masks import Mask

MARK: Final = "neurontune"
"""The entry of a card's front matter by which an export is known."""

_MEANINGS: Final[Mapping[str, str]] = {
    "asr": "attacks that succeed",
    "over_refusal": "borderline prompts refused",
    "benign_correct": "benign prompts answered rightly",
    "refusal_plain": "plain harmful prompts refused",
}
_DUAL_USE: Final = """\
## Dual use

What strengthens a model's refusals names the neurons that carry them. Whoever has these weights and those of
the base model can read from the difference which neurons they are and by how much each is scaled, and can
apply the opposite. Treat this folder as you treat the mask. The level is not enforced: whoever runs the model
chooses whether it is loaded. It moves measured rates on measured prompts and guarantees no single answer."""


def card(mask: "Mask", level: SafetyLevel, base: str, kind: str, use: str) -> str:
    """The README.md of one export. `kind` says what it is, `use` how it is run; both are Markdown."""
    metadata, threshold = mask.metadata, level.threshold
    front = {
        "base_model": base,
        MARK: {
            "level": level.name,
            "num_safety": threshold.num_safety,
            "num_utility": threshold.num_utility,
            "mask": mask.digest,
            "base_model_fingerprint": metadata.model_fingerprint,
        },
    }
    rows = [
        ("safety level", f"`{level.name}`"),
        (
            "threshold",
            f"{threshold.num_safety} of {len(mask.safety)} safety neurons, "
            f"{threshold.num_utility} of {len(mask.utility)} utility neurons",
        ),
        ("mask", f"`{mask.digest}` (SHA-256)"),
        ("base model", f"{base} ({metadata.architecture})"),
        ("fingerprint of its weights", f"`{metadata.model_fingerprint}`"),
    ]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {base} at the safety level {level.name}",
        f"{kind} Made by `neurontune export` from a mask of NeuronTune Server.",
        "\n".join(["| what | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]),
        f"## Use\n\n{use}",
        f"## Evaluation\n\n{_evaluation(mask, level)}",
        _DUAL_USE,
    ]
    return "\n\n".join(parts) + "\n"


def _evaluation(mask: "Mask", level: SafetyLevel) -> str:
    """The rates that the mask records, of this level beside `off`."""
    profile = profile_of(mask)
    here = recorded_rates(profile, level)
    if not here:
        return "The mask records no evaluation of this level. Measure it before you rely on it."
    off = recorded_rates(profile, SafetyLevel(OFF, ZERO))
    rows = [
        f"| {_MEANINGS[name]} | {_rate(off.get(name))} | {_rate(here.get(name))} |"
        for name in METRICS
        if name in here or name in off
    ]
    measured = f" Measured on: {profile.prompts}." if profile.prompts else ""
    return "\n".join(
        [
            "As the mask records it, with 95 % intervals, of the modulated model in memory; this export was "
            f"not measured again.{measured}",
            "",
            f"| | `{OFF}` | `{level.name}` |",
            "|---|---|---|",
            *rows,
        ]
    )


def _rate(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "not recorded"
    interval = f" ({found['low']:.1%} to {found['high']:.1%})" if {"low", "high"} <= found.keys() else ""
    return f"{found['rate']:.1%}{interval}"
