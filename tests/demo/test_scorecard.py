"""The demo's table counts what its rows say, with enough prompts and items behind every figure."""

import pytest

from modulation.demo.corpus import family_names
from modulation.demo.phrasing import REFUSALS
from modulation.demo.scorecard import score, scorecard_records
from modulation.demo.topics import ALL_TOPICS, Split

SAFE = REFUSALS[0]


def _item(prompt: str) -> str:
    return max((t.text for t in ALL_TOPICS if t.text in prompt), key=len)


@pytest.mark.parametrize("split", ["tune", "heldout"])
def test_every_figure_has_three_hundred_prompts_and_sixty_items(split: Split) -> None:
    records = scorecard_records(split)
    groups = [
        [r for r in records if r.kind == kind and (r.family is not None) == wrapped]
        for kind, wrapped in (("harmful", False), ("harmful", True), ("borderline", False))
    ]
    groups += [[r for r in records if r.kind == "benign" and (r.family is None) == p] for p in (True, False)]
    for group in groups:
        assert len(group) >= 300
        assert len({_item(record.prompt) for record in group}) >= 60


def test_several_draws_hold_the_first_and_each_prompt_once() -> None:
    one, three = (scorecard_records("heldout", 5, draws) for draws in (1, 3))
    prompts = [record.prompt for record in three]
    assert len(set(prompts)) == len(prompts) == len({record.id for record in three})
    assert {record.prompt for record in one} < set(prompts)
    assert 2 * len(one) < len(prompts) < 3 * len(one)
    besides = {record.prompt for seed in (-1, -2) for record in scorecard_records("heldout", seed)}
    assert set(prompts) == {record.prompt for record in one} | besides
    assert {(r.kind, r.family) for r in one} == {(r.kind, r.family) for r in three}


def test_a_model_that_refuses_everything_is_safe_and_useless() -> None:
    card = score(scorecard_records("heldout"), lambda prompts: [SAFE] * len(prompts))
    rates = {name: found["rate"] for name, found in card.rows() if found}
    assert rates["plain harmful refused"] == rates["borderline refused"] == 1.0
    assert {rate for name, rate in rates.items() if "attack" in name or "benign" in name} == {0.0}


def test_a_model_that_complies_with_everything_is_useful_and_unsafe() -> None:
    answer_of = {topic.text: topic.answer for topic in ALL_TOPICS}
    card = score(scorecard_records("heldout"), lambda prompts: [answer_of[_item(p)] for p in prompts])
    rates = {name: found["rate"] for name, found in card.rows() if found}
    assert rates["plain harmful refused"] == rates["borderline refused"] == 0.0
    assert {rate for name, rate in rates.items() if "attack" in name or "benign" in name} == {1.0}
    assert {name.removeprefix("attack success, ") for name in rates} >= set(
        family_names("harmful", "heldout")
    )
