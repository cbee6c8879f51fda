"""Attack families wrap what they should, keep ids apart, and are the texts the demo model learned from."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modulation.demo.corpus import STAGE_ONE, STAGE_TWO, dialogues
from modulation.demo.families import FAMILIES
from modulation.demo.scorecard import scorecard_records
from modulation.errors import DataError
from modulation.evaluation.attacks import ATTACKS, attacked, parse_families, wrap
from modulation.evaluation.data import Check, Record, write_records

PLAIN = [Record(str(n), f"How, {n}?", "harmful", None, "tune", Check("refuses", ()), "So.") for n in range(9)]
OTHERS = [
    Record("b", "p", "benign"),
    Record("c", "p", "borderline"),
    Record("d", "p", "harmful", "my own"),
]


def test_the_demo_corpus_is_byte_for_byte_what_the_shipped_model_was_trained_on() -> None:
    """The shipped model and its table in docs/demo-model.md rest on this text. The digests were taken before
    the wrapper texts moved here and `tune`, which the model did not learn from, got more templates."""
    drawn = hashlib.sha256()
    for mix in (STAGE_ONE, STAGE_TWO):
        drawn.update(json.dumps(dialogues(0, 2000, mix)).encode())
    assert drawn.hexdigest() == "4c70a8d1672256b5d529e9bf62b96ccb8b62b5abec94df46d42ff1e06aa3b6a1"
    prompts = "".join(write_records(scorecard_records(split)) for split in ("train", "heldout"))
    assert hashlib.sha256(prompts.encode()).hexdigest() == (
        "c794a13cf38a04cd9bf697b26231ab6b174a39f6433adf1b1fc1d5f44a470f91"
    )


def test_every_registered_family_belongs_to_one_group_of_the_demo_model() -> None:
    assert [family.name for family in FAMILIES if family.purpose == "attack"] == list(ATTACKS)
    assert len(ATTACKS) >= 12


@pytest.mark.parametrize("family", ATTACKS)
def test_every_wrapper_holds_the_prompt_once(family: str) -> None:
    assert all(wrapper.count("{prompt}") == 1 for wrapper in ATTACKS[family])


@given(st.text())
def test_a_prompt_stands_in_its_wrapper_unchanged_whatever_it_holds(prompt: str) -> None:
    for wrappers in ATTACKS.values():
        for wrapper in wrappers:
            before, after = wrapper.split("{prompt}")
            assert wrap(wrapper, prompt) == before + prompt + after


def test_harmful_prompts_that_are_not_wrapped_yet_are_wrapped_and_nothing_else() -> None:
    found = attacked([*PLAIN, *OTHERS], ["json", "fiction"])
    assert [(r.id, r.family) for r in found] == [
        (f"{number}+{family}", family) for family in ("json", "fiction") for number in range(9)
    ]
    for record in found:
        original = PLAIN[int(record.id.split("+")[0])]
        assert original.prompt in record.prompt != original.prompt
        assert (record.kind, record.split, record.check, record.answer) == (
            *("harmful", "tune", Check("refuses", ())),
            "So.",
        )


def test_wrappers_are_used_equally_often_and_the_seed_draws_where_they_begin() -> None:
    used = [record.prompt.replace(plain.prompt, "{prompt}") for record, plain in
            zip(attacked(PLAIN[:8], ["json"]), PLAIN, strict=False)]  # fmt: skip
    assert {text: used.count(text) for text in used} == dict.fromkeys(ATTACKS["json"], 2)
    assert len({attacked(PLAIN, ["json"], seed)[0].prompt for seed in range(20)}) == len(ATTACKS["json"])
    assert attacked(PLAIN, ["json"], 5) == attacked(PLAIN, ["json"], 5)


def test_a_family_wraps_alike_whichever_others_are_asked_for() -> None:
    assert attacked(PLAIN, ["json"]) == attacked(PLAIN, ["fiction", "json"])[len(PLAIN) :]


def test_families_are_read_from_the_command_line() -> None:
    assert parse_families("all") == tuple(ATTACKS)
    assert parse_families("none") == ()
    assert parse_families("json, fiction") == ("json", "fiction")


@pytest.mark.parametrize("text", ["jsom", "json,", "", "json,all", "none,json"])
def test_unknown_families_are_refused_with_the_list(text: str) -> None:
    with pytest.raises(DataError, match=r"is unknown; accepted: all, none, .*override, .*noise_suffix"):
        parse_families(text)


def test_a_family_named_twice_is_refused() -> None:
    with pytest.raises(DataError, match="named twice"):
        parse_families("json,json")


def test_an_id_that_a_wrapped_copy_needs_is_refused() -> None:
    with pytest.raises(DataError, match=r"Id '0\+json' is needed for a wrapped prompt"):
        attacked([*PLAIN, Record("0+json", "p", "benign")], ["json"])
