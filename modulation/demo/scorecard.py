"""The demo model's table: which prompts are behind it, and which rates are in it.

Knows the corpus and the metrics; knows nothing of how answers are made.
"""

from dataclasses import dataclass, replace

from modulation.demo.corpus import family_names, records
from modulation.demo.topics import Split
from modulation.evaluation.answering import Answerer
from modulation.evaluation.data import Record
from modulation.evaluation.metrics import Metrics, Rate, evaluate_answers

PER_TOPIC_PLAIN_HARMFUL = 4
PER_TOPIC_BORDERLINE = 4
PER_TOPIC_PLAIN_BENIGN = 3


@dataclass(frozen=True)
class Scorecard:
    """All the metrics, and benign correctness by whether the prompt was wrapped."""

    metrics: Metrics
    benign_plain: Rate
    benign_wrapped: Rate

    def rows(self) -> list[tuple[str, Rate | None]]:
        """Names and rates in the order of the printed table."""
        metrics = self.metrics
        return [
            ("plain harmful refused", metrics["refusal_plain"]),
            ("attack success, all families", metrics["asr"]),
            *((f"attack success, {name}", r) for name, r in metrics["asr_by_family"].items()),
            ("borderline refused", metrics["over_refusal"]),
            ("benign correct, plain", self.benign_plain),
            ("benign correct, wrapped", self.benign_wrapped),
        ]


def scorecard_records(split: Split, seed: int = 0, draws: int = 1) -> list[Record]:
    """Every topic of the split: harmful ones plain and in each attack family, borderline ones
    plain, benign ones plain and in each benign wrapper. Of several draws, the seed's and those of negative
    seeds, which no mask has, each different prompt once."""
    if draws == 1:
        return _drawn(split, seed)
    found: dict[str, Record] = {}
    for one in (seed, *range(-1, -draws, -1)):
        for each in _drawn(split, one):
            found.setdefault(each.prompt, replace(each, id=f"{each.id}-{one}"))
    return list(found.values())


def _drawn(split: Split, seed: int) -> list[Record]:
    found = records("harmful", split, None, seed, PER_TOPIC_PLAIN_HARMFUL)
    found += records("borderline", split, None, seed, PER_TOPIC_BORDERLINE)
    found += records("benign", split, None, seed, PER_TOPIC_PLAIN_BENIGN)
    for kind in ("harmful", "benign"):
        for family in family_names(kind, split):
            found += records(kind, split, family, seed)
    return found


def score(prompts: list[Record], answer: Answerer) -> Scorecard:
    """Have every prompt answered, and judge the answers."""
    answers = answer([record.prompt for record in prompts])
    benign = [(r, a) for r, a in zip(prompts, answers, strict=True) if r.kind == "benign"]
    return Scorecard(
        metrics=evaluate_answers(prompts, answers),
        benign_plain=_correct([(r, a) for r, a in benign if r.family is None]),
        benign_wrapped=_correct([(r, a) for r, a in benign if r.family is not None]),
    )


def _correct(judged: list[tuple[Record, str]]) -> Rate:
    return evaluate_answers([r for r, _ in judged], [a for _, a in judged])["benign_correct"]
