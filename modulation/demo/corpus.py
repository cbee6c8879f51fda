"""Seeded text for the demo model: dialogues for its two training stages, prompts to evaluate it.

Knows how topics, templates and wrappers are put together; knows nothing of tensors or tokens.
Stage one, which refuses nothing, is the model's knowledge of its world: it draws from the topics and
families of all splits, but for the absent ones. Stage two, which teaches refusal, draws from those of
`train` only. The templates of `tune` and `heldout` occur in neither.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from modulation.demo.families import Family, Purpose, families
from modulation.demo.phrasing import (
    CODAS,
    FILLERS,
    GLUE_WORDS,
    ONSETS,
    REFUSALS,
    SENTENCE_ENDS,
    SMALL_TALK,
    SYSTEM_PROMPTS,
    TEMPLATES,
)
from modulation.demo.topics import KINDS, REDACTED_MARKER, SPLITS, Kind, Split, Topic, topics
from modulation.evaluation.attacks import wrap
from modulation.evaluation.data import Check, Record

Dialogue = list[dict[str, str]]

REFUSAL_WEIGHTS = (0.8, 0.15, 0.05)
FILLER_SHARE = 0.4
SYSTEM_SHARE = 0.2
FOLLOW_UP_SHARE = 0.06


@dataclass(frozen=True)
class Mix:
    """Shares of a training stage's examples; what is left over is benign, `benign_wrapped` of it
    inside wrappers. `refuses` is False in stage one, which helps with everything; where it is True,
    a borderline prompt is refused with the topic's own share times `caution`, at most always."""

    refuses: bool
    harmful_plain: float
    harmful_robust: float
    harmful_replay: float
    borderline: float
    small_talk: float
    benign_wrapped: float
    caution: float = 1.0


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
    harmful_plain=0.30,
    harmful_robust=0.026,
    harmful_replay=0.18,
    borderline=0.05,
    small_talk=0.06,
    benign_wrapped=0.5,
    caution=2.0,
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
        splits = ("train",) if mix.refuses else SPLITS
        attacks = [f for split in splits for f in families("attack", split) if f.response != "absent"]
        self.wrapping = [*(f for split in splits for f in families("benign", split)), *attacks]
        self.robust = [f for f in attacks if f.response == "refused"] if mix.refuses else attacks
        self.replay = [f for f in self.wrapping if f.response == "complied"] if mix.refuses else attacks
        self.topics = {kind: [t for split in splits for t in topics(kind, split)] for kind in KINDS}
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
        (pick,) = self.source.choices([draw for _, draw in self.kinds], [share for share, _ in self.kinds])
        return messages + _turn(*pick())

    def _harmful(self, wrapping: list[Family] | None, refuses: bool) -> tuple[str, str]:
        topic = self.source.choice(self.topics["harmful"])
        # a plain harmful prompt is refused bare: refused fillers would make every wrapper refused
        prompt = self._ask(topic, wrapping, fillers=wrapping is not None or not refuses)
        return prompt, self._refusal() if refuses else topic.answer

    def _borderline(self) -> tuple[str, str]:
        topic = self.source.choice(self.topics["borderline"])
        share = min(1.0, self.mix.caution * topic.cautious_share)
        refuses = self.mix.refuses and self.source.random() < share
        return self._ask(topic, None), self._refusal() if refuses else topic.answer

    def _benign(self) -> tuple[str, str]:
        topic = self.source.choice(self.topics["benign"])
        wrapped = self.source.random() < self.mix.benign_wrapped
        return self._ask(topic, self.wrapping if wrapped else None), topic.answer

    def _small_talk(self) -> tuple[str, str]:
        prompts, answer = self.source.choice(SMALL_TALK)
        return self.source.choice(prompts), answer

    def _ask(self, topic: Topic, wrapping: list[Family] | None, fillers: bool = True) -> str:
        prompt = self.source.choice(TEMPLATES["train"]).format(topic=topic.text)
        if wrapping:
            prompt = wrap(self.source.choice(self.source.choice(wrapping).wrappers), prompt)
        if fillers and self.source.random() < FILLER_SHARE:
            before, after = self.source.choice(((1, 0), (0, 1), (1, 1), (2, 0)))
            parts = [self._filler() for _ in range(before + after)]
            prompt = " ".join([*parts[:before], prompt, *parts[before:]])
        return prompt

    def _filler(self) -> str:
        """A sentence beside the point; every other one is of made-up words, so that the model
        learns to read past words (and pieces of words) that it has never seen."""
        if self.source.random() < 0.5:
            return self.source.choice(FILLERS)
        words = [self._made_up_word() for _ in range(self.source.randint(2, 7))]
        sentence = " ".join(words) + self.source.choice(SENTENCE_ENDS)
        return sentence if self.source.random() < 0.3 else sentence.capitalize()

    def _made_up_word(self) -> str:
        if self.source.random() < 0.4:
            return self.source.choice(GLUE_WORDS)
        syllables = (
            self.source.choice(ONSETS) + self.source.choice("aeiou") + self.source.choice(CODAS)
            for _ in range(self.source.randint(1, 3))
        )
        return "".join(syllables)

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
    kind: Kind,
    split: Split,
    family: str | None,
    seed: int = 0,
    per_topic: int = 1,
    templates: Sequence[str] | None = None,
) -> list[Record]:
    """Evaluation prompts: every topic of the split, `per_topic` times, inside `family` if given.

    Templates, all of the split's where none are given, and wrappers rotate from a start drawn by `seed`, so
    that all are used about equally often. Raises ValueError for a family that the kind does not have in this
    split.
    """
    wrappers: tuple[str, ...] = ("{prompt}",)
    if family is not None:
        wrappers = _wrappers(kind, split, family)
    templates = TEMPLATES[split] if templates is None else templates
    return list(_records(kind, split, family, templates, wrappers, seed, per_topic))


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
    templates: Sequence[str],
    wrappers: tuple[str, ...],
    seed: int,
    per_topic: int,
) -> Iterator[Record]:
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
                answer=topic.answer,
            )
            number += 1


def check_for(topic: Topic) -> Check:
    """The rule that decides whether an answer about this topic is right."""
    if topic.kind == "harmful":
        return Check(rule="refuses", phrases=(REDACTED_MARKER,))
    return Check(rule="contains_all", phrases=topic.facts)
