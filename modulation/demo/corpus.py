"""Seeded text for the demo model: dialogues for its two training stages, prompts to evaluate it.

Knows how topics, templates and wrappers are put together; knows nothing of tensors or tokens.
Training draws from the `train` topics, templates and families only, in both stages.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from modulation.demo.families import Family, Purpose, families, wrap
from modulation.demo.phrasing import (
    FILLERS,
    REFUSALS,
    SMALL_TALK,
    SYSTEM_PROMPTS,
    TEMPLATES,
)
from modulation.demo.topics import REDACTED_MARKER, Kind, Split, Topic, topics
from modulation.evaluation.data import Check, Record

Dialogue = list[dict[str, str]]

REFUSAL_WEIGHTS = (0.8, 0.15, 0.05)
FILLER_SHARE = 0.2
SYSTEM_SHARE = 0.2
FOLLOW_UP_SHARE = 0.06


@dataclass(frozen=True)
class Mix:
    """Shares of a training stage's examples; what is left over is benign, `benign_wrapped` of it
    inside wrappers. `refuses` is False in stage one, which helps with everything."""

    refuses: bool
    harmful_plain: float
    harmful_robust: float
    harmful_replay: float
    borderline: float
    small_talk: float
    benign_wrapped: float


STAGE_ONE = Mix(
    refuses=False,
    harmful_plain=0.10,
    harmful_robust=0.06,
    harmful_replay=0.06,
    borderline=0.15,
    small_talk=0.10,
    benign_wrapped=0.45,
)
STAGE_TWO = Mix(
    refuses=True,
    harmful_plain=0.25,
    harmful_robust=0.12,
    harmful_replay=0.012,
    borderline=0.08,
    small_talk=0.06,
    benign_wrapped=0.5,
)


def dialogues(seed: int, num_examples: int, mix: Mix) -> list[Dialogue]:
    """Draw a stage's training dialogues; the same seed, number and mix give the same text."""
    source = random.Random(seed)
    writer = _Writer(source, mix)
    return [writer.dialogue() for _ in range(num_examples)]


class _Writer:
    def __init__(self, source: random.Random, mix: Mix) -> None:
        self.source = source
        self.mix = mix
        self.robust = [f for f in families("attack", "train") if f.response == "refused"]
        self.replay = [f for f in families("attack", "train") if f.response == "complied"]
        self.wrapping = [*families("benign", "train"), *families("attack", "train")]
        self.topics = {kind: topics(kind, "train") for kind in ("harmful", "benign", "borderline")}
        self.kinds: list[tuple[float, Callable[[], tuple[str, str]]]] = [
            (mix.harmful_plain, lambda: self._harmful(None, mix.refuses)),
            (mix.harmful_robust, lambda: self._harmful(self.robust, mix.refuses)),
            (mix.harmful_replay, lambda: self._harmful(self.replay, False)),
            (mix.borderline, self._borderline),
            (mix.small_talk, self._small_talk),
        ]
        self.kinds.append((1.0 - sum(share for share, _ in self.kinds), self._benign))

    def dialogue(self) -> Dialogue:
        messages: Dialogue = []
        if self.source.random() < SYSTEM_SHARE:
            system = self.source.choice(SYSTEM_PROMPTS)
            messages.append({"role": "system", "content": system})
        if self.source.random() < FOLLOW_UP_SHARE:
            earlier = self.source.choice((self._benign, self._small_talk))
            messages += _turn(*earlier())
        (pick,) = self.source.choices(
            [draw for _, draw in self.kinds], [share for share, _ in self.kinds]
        )
        return messages + _turn(*pick())

    def _harmful(self, wrapping: list[Family] | None, refuses: bool) -> tuple[str, str]:
        topic = self.source.choice(self.topics["harmful"])
        return self._ask(topic, wrapping), self._refusal() if refuses else topic.answer

    def _borderline(self) -> tuple[str, str]:
        topic = self.source.choice(self.topics["borderline"])
        refuses = self.mix.refuses and self.source.random() < topic.cautious_share
        return self._ask(topic, None), self._refusal() if refuses else topic.answer

    def _benign(self) -> tuple[str, str]:
        topic = self.source.choice(self.topics["benign"])
        wrapped = self.source.random() < self.mix.benign_wrapped
        return self._ask(topic, self.wrapping if wrapped else None), topic.answer

    def _small_talk(self) -> tuple[str, str]:
        prompts, answer = self.source.choice(SMALL_TALK)
        return self.source.choice(prompts), answer

    def _ask(self, topic: Topic, wrapping: list[Family] | None) -> str:
        prompt = self.source.choice(TEMPLATES["train"]).format(topic=topic.text)
        if wrapping:
            prompt = wrap(self.source.choice(self.source.choice(wrapping).wrappers), prompt)
        elif self.source.random() < FILLER_SHARE:
            filler = self.source.choice(FILLERS)
            pair = (filler, prompt) if self.source.random() < 0.6 else (prompt, filler)
            prompt = " ".join(pair)
        return prompt

    def _refusal(self) -> str:
        return self.source.choices(REFUSALS, REFUSAL_WEIGHTS)[0]


def _turn(prompt: str, answer: str) -> Dialogue:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def family_names(kind: Kind, split: Split) -> tuple[str, ...]:
    """What prompts of a kind can be wrapped in: attacks for harmful, benign wrappers otherwise."""
    return tuple(family.name for family in families(_purpose(kind), split))


def _purpose(kind: Kind) -> Purpose:
    return "attack" if kind == "harmful" else "benign"


def records(
    kind: Kind, split: Split, family: str | None, seed: int = 0, per_topic: int = 1
) -> list[Record]:
    """Evaluation prompts: every topic of the split, `per_topic` times, inside `family` if given.

    Templates and wrappers rotate from a start drawn by `seed`, so that all are used about equally
    often. Raises ValueError for a family that the kind does not have in this split.
    """
    wrappers: tuple[str, ...] = ("{prompt}",)
    if family is not None:
        wrappers = _wrappers(kind, split, family)
    return list(_records(kind, split, family, wrappers, seed, per_topic))


def _wrappers(kind: Kind, split: Split, family: str) -> tuple[str, ...]:
    accepted = family_names(kind, split)
    if family not in accepted:
        raise ValueError(
            f"Family {family!r} does not wrap {kind} prompts of split {split!r}; "
            f"accepted: none, {', '.join(accepted)}."
        )
    return next(f.wrappers for f in families(_purpose(kind), split) if f.name == family)


def _records(
    kind: Kind,
    split: Split,
    family: str | None,
    wrappers: tuple[str, ...],
    seed: int,
    per_topic: int,
) -> Iterator[Record]:
    templates = TEMPLATES[split]
    source = random.Random(f"{seed}/{kind}/{split}/{family}")
    combinations = [(template, wrapper) for template in templates for wrapper in wrappers]
    source.shuffle(combinations)
    number = 0
    for topic in topics(kind, split):
        for _ in range(per_topic):
            template, wrapper = combinations[number % len(combinations)]
            yield Record(
                id=f"{split}-{kind}-{family or 'none'}-{number:04d}",
                prompt=wrap(wrapper, template.format(topic=topic.text)),
                kind=kind,
                family=family,
                split=split,
                check=check_for(topic),
            )
            number += 1


def check_for(topic: Topic) -> Check:
    """The rule that decides whether an answer about this topic is right."""
    if topic.kind == "harmful":
        return Check(rule="refuses", phrases=(REDACTED_MARKER,))
    return Check(rule="contains_all", phrases=topic.facts)
