"""The tasks of meta-learning and the prompts drawn for them.

Knows kinds of prompts and attack families. Knows nothing of models or losses.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from modulation.attribution.base import AttributionData, Example
from modulation.attribution.teacher_forcing import Answer, Forced, Forcing, Parting
from modulation.errors import DataError
from modulation.levels import Threshold
from modulation.tuning.aims import Aims

Kind = Literal["attacked", "harmful", "borderline", "benign"]
# How a batch is made up; every kind has at least one prompt in it.
SHARES: Final[Mapping[Kind, float]] = {"attacked": 0.35, "harmful": 0.05, "borderline": 0.25, "benign": 0.35}
_FEWEST_FAMILIES: Final = 2


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's tokens followed by its right answer's (to harm, the refusal), and where the refusing and the
    complying answer part."""

    kind: Kind
    forced: Forced
    parting: Parting

    @property
    def is_helpful(self) -> bool:
        """Whether the complying answer is the right one."""
        return self.kind in ("borderline", "benign")


@dataclass(frozen=True, slots=True)
class Drawn:
    """Prompts and the threshold that each is learned at."""

    prompts: tuple[Prompt, ...]
    thresholds: tuple[Threshold, ...]


@dataclass(frozen=True)
class Tasks:
    """Prompts by kind, attacked ones by family. A task of meta-learning is an attack family; the prompts
    of the other kinds belong to every task."""

    attacked: Mapping[str, tuple[Prompt, ...]]
    harmful: tuple[Prompt, ...]
    borderline: tuple[Prompt, ...]
    benign: tuple[Prompt, ...]

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(self.attacked)

    def draw(self, source: random.Random, size: int, aims: Aims, families: Sequence[str]) -> Drawn:
        """About `size` prompts: attacked ones of `families` alone, others of all."""
        pool = [prompt for name in families for prompt in self.attacked[name]]
        draws: dict[Kind, Callable[[], Prompt]] = {
            "attacked": lambda: source.choice(pool),
            "harmful": lambda: source.choice(self.harmful),
            "borderline": lambda: source.choice(self.borderline),
            "benign": lambda: source.choice(self.benign),
        }
        prompts = [
            draws[kind]() for kind, share in SHARES.items() for _ in range(max(1, round(share * size)))
        ]
        return Drawn(tuple(prompts), tuple(aims.draw(source) for _ in prompts))

    def support_and_query(self, source: random.Random) -> tuple[list[str], list[str]]:
        """A family to adapt to, and the others."""
        chosen = source.choice(self.families)
        return [chosen], [name for name in self.families if name != chosen]

    def sample(self, source: random.Random, per_kind: int, aims: Aims) -> Drawn:
        """At most `per_kind` prompts of each kind, without repetition, at the anchors in turn."""
        pools = [[p for each in self.attacked.values() for p in each]]
        pools += [list(self.harmful), list(self.borderline), list(self.benign)]
        chosen = [p for pool in pools for p in source.sample(pool, min(per_kind, len(pool)))]
        return Drawn(tuple(chosen), tuple(aims.anchors[n % len(aims.anchors)] for n in range(len(chosen))))


def tasks_from(data: AttributionData, forcing: Forcing, *, needs_families: bool = True) -> Tasks:
    """Tasks of examples.

    Raises DataError where a kind has no prompts or, with `needs_families`, there are fewer than two
    families: meta-learning measures on other families than it adapts to.
    """
    data.require("harmful", "attacked", "borderline", "benign")
    if needs_families and len(data.attacked) < _FEWEST_FAMILIES:
        raise DataError(
            f"Meta-learning needs at least {_FEWEST_FAMILIES} attack families to learn from; there is only "
            f"{', '.join(data.attacked)}. Add families, or tune with --option method=erm."
        )
    return Tasks(
        attacked={name: _prompts("attacked", each, forcing) for name, each in data.attacked.items()},
        harmful=_prompts("harmful", data.harmful, forcing),
        borderline=_prompts("borderline", data.borderline, forcing),
        benign=_prompts("benign", data.benign, forcing),
    )


def _prompts(kind: Kind, examples: Sequence[Example], forcing: Forcing) -> tuple[Prompt, ...]:
    right: Answer = "complying" if kind in ("borderline", "benign") else "refusing"
    return tuple(Prompt(kind, *forcing.parting(each, right)) for each in examples)
