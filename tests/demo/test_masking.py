"""The demo mask's recipe: what it may read, and how its rivals are measured beside it."""

import json
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from modulation.attribution.base import Scores
from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.demo.comparison import compare, comparison_table, read_comparable, save_plot
from modulation.demo.corpus import family_names, records
from modulation.demo.fewshot import NUM_SHOTS, adaptations
from modulation.demo.masking import ACTIVE_SHARE, PRUNED, TUNING_PROMPTS_PER_TOPIC, Bench, examples
from modulation.demo.phrasing import TEMPLATES
from modulation.demo.rivals import FIXED_METHODS, Rivals, Row, with_random_neurons
from modulation.demo.splits import (
    VALIDATION_FAMILIES,
    all_records,
    learning_records,
    level_records,
    validation_records,
)
from modulation.demo.topics import ALL_TOPICS, Kind, Split, Topic, topics
from modulation.errors import DataError
from modulation.evaluation.data import Record
from modulation.levels import BALANCED, SECURITY_CRITICAL, UTILITY_PRIORITY, Threshold
from modulation.loading import load_model, load_tokenizer
from modulation.masks import Mask
from modulation.rivals.choice import NoSettingError
from modulation.tuning.runs import AdaptationRun
from modulation.tuning.settings import TuningSettings

HELPFUL: tuple[Kind, ...] = ("borderline", "benign")
TEXTS = sorted((each.text for each in ALL_TOPICS), key=len, reverse=True)


@pytest.fixture(scope="module")
def bench() -> Bench:
    model = load_model(str(MODEL_DIR), device="cpu", dtype="float32")
    return Bench(model, load_tokenizer(str(MODEL_DIR)))


@pytest.fixture(scope="module")
def mask() -> Mask:
    return Mask.load(MASK_FILE)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_learned_from_what_chooses_and_what_is_held_out_share_no_prompt(seed: int) -> None:
    learning, validation = learning_records(seed, 8), level_records(seed)
    held = {
        record.prompt
        for kind in ("harmful", "benign", "borderline")
        for family in (None, *family_names(kind, "heldout"))
        for record in records(kind, "heldout", family)
    }
    seen, judged = {each.prompt for each in learning}, {each.prompt for each in validation}
    assert not seen & judged
    assert not (seen | judged | {each.prompt for each in all_records(seed)}) & held
    assert {each.split for each in (*learning, *validation, *all_records(seed))} == {"tune"}


def test_levels_are_chosen_by_nearly_every_sentence_of_the_validation_part_and_each_once() -> None:
    """Of a seed's five draws a third of the plain prompts are there twice, and others not at all."""
    found = level_records(0)
    plain = [each.prompt for each in found if each.family not in VALIDATION_FAMILIES]
    assert len(plain) == len(set(plain))
    for seed in (0, 1):
        drawn = [
            each for each in level_records(seed) if each.kind in ("borderline", "harmful") and not each.family
        ]
        assert len(drawn) > 0.9 * 6 * len({_topic(each) for each in drawn})  # six templates
    assert {each.prompt for each in validation_records(0, 5) if each.family in VALIDATION_FAMILIES} == {
        each.prompt for each in found if each.family in VALIDATION_FAMILIES
    }


def test_the_validation_families_are_not_learned_from_while_choices_are_made() -> None:
    learned = {each.family for each in learning_records(0) if each.kind == "harmful"}
    judged = {each.family for each in validation_records(0) if each.kind == "harmful"}
    assert judged == {None, *VALIDATION_FAMILIES}
    assert not learned & set(VALIDATION_FAMILIES)
    assert learned | judged == {None, *family_names("harmful", "tune")}


def test_words_of_the_borderline_and_benign_prompts_that_choose_are_known_as_those_of_heldout_are() -> None:
    learned, judged = _helpful_topics(learning_records(0)), _helpful_topics(validation_records(0))
    tune, heldout = (
        {each for kind in HELPFUL for each in topics(kind, split)} for split in ("tune", "heldout")
    )
    for known, asked in ((learned, judged), (tune, heldout)):
        assert {each.thing for each in asked} <= {each.thing for each in known}
        assert {each.verb for each in asked} <= {each.verb for each in known}
    assert learned | judged == tune and learned.isdisjoint(judged)
    for kind in HELPFUL:
        assert sum(each.kind == kind for each in judged) == round(len(topics(kind, "tune")) / 4)


def test_templates_that_choose_are_not_learned_from() -> None:
    """A record's template stands in its prompt as it is, but for the topic."""
    learned, judged = _templates(learning_records(0, 8)), _templates(validation_records(0, 5))
    assert learned.isdisjoint(judged) and learned | judged == set(TEMPLATES["tune"])
    for found, own, others in (
        (learning_records(0), learned, judged),
        (validation_records(0), judged, learned),
    ):
        asked = [
            {each for each in TEMPLATES["tune"] if each.format(topic=_topic(record)) in record.prompt}
            for record in found
        ]
        assert not set().union(*asked) & others
        assert sum(bool(each & own) for each in asked) > 0.9 * len(found)  # a wrapper may name another topic
    assert len(learned) == 2 * len(judged)
    assert _templates(all_records(0, 8)) == learned | judged


def _templates(found: list[Record]) -> set[str]:
    return {each.prompt.replace(_topic(each), "{topic}") for each in found if each.family is None}


def _topic(record: Record) -> str:
    return next(text for text in TEXTS if text in record.prompt)


def _helpful_topics(found: list[Record]) -> set[Topic]:
    answers = {each.answer for each in found}
    return {each for each in ALL_TOPICS if each.kind in HELPFUL and each.answer in answers}


def test_every_example_has_an_answer_about_its_own_prompt() -> None:
    data = examples(all_records(0))
    for example in data.harmful + data.benign + data.borderline:
        asked = example.complying.removeprefix("Here is how to ").split(":")[0]
        assert asked in example.prompt, example
    assert all("[redacted" in example.complying for example in data.all_harmful)
    assert len({len(each) for each in data.attacked.values()}) == 1


def test_the_shipped_mask_activates_at_most_two_percent_and_says_how_it_came_about(mask: Mask) -> None:
    total = mask.metadata.num_layers * mask.metadata.neurons_per_layer
    assert len(mask.safety) + len(mask.utility) <= ACTIVE_SHARE * total < 0.02 * total
    assert set(mask.metadata.levels) == {SECURITY_CRITICAL, BALANCED, UTILITY_PRIORITY}
    assert {"attribution", "tuning", "rule", "validation"} <= set(mask.metadata.method)
    evaluation = mask.metadata.evaluation
    assert set(evaluation["levels"]) == {"off", *mask.metadata.levels}
    assert len(evaluation["curve"]) > 3
    off, critical = (evaluation["levels"][name]["asr"]["rate"] for name in ("off", SECURITY_CRITICAL))
    assert critical < 0.5 * off


def test_every_method_and_rival_has_a_row(bench: Bench, mask: Mask) -> None:
    names = [row.name for row in Rivals(bench, mask, TuningSettings()).rows()]
    assert len(set(names)) == len(names)
    assert set(FIXED_METHODS) < set(names)
    assert {"no change", "steering vector", "whole layers scaled"} < set(names)
    controls = (
        "attributed neurons, not pruned",
        "random neurons, learned factors",
        "random candidates, pruned",
        "random neurons, our factors",
    )
    assert set(controls) < set(names)


@dataclass(frozen=True)
class Noting(Bench):
    """Finds random scores, learns nothing, and notes what it is asked to learn."""

    noted: list[tuple[object, ...]] = field(default_factory=list)

    def scores(self, *_: object) -> Scores:
        return Scores(*torch.rand(2, 6, 640, generator=torch.Generator().manual_seed(0)))

    def tuned(self, mask: Mask, settings: TuningSettings, *_: object, **__: object) -> Mask:
        self.noted.append((len(mask.safety), settings.method, settings.prune_shares, settings.num_steps))
        return mask


def test_controls_learn_as_long_as_ours_and_are_pruned_where_they_say_so(bench: Bench, mask: Mask) -> None:
    shares = PRUNED["prune_shares"]
    noting = Noting(bench.model, bench.tokenizer)
    rows = Rivals(noting, mask, TuningSettings(**PRUNED)).rows()
    prepared = {row.name: row.prepare for row in rows if row.kind == "control" and "fixed" not in row.name}
    steps = mask.metadata.method["tuning"]["num_steps"]
    pruned, whole = (307, "maml", shares, steps), (38, "maml", (), steps + 3 * TuningSettings().prune_steps)
    for name, expected in {
        "plain risk minimisation, all neurons": (307, "erm", shares, steps),
        "attributed neurons, not pruned": whole,
        "random neurons, learned factors": whole,
        "random candidates, pruned": pruned,
    }.items():
        prepared.pop(name)()
        assert noting.noted.pop() == expected, name
    assert list(prepared) == ["random neurons, our factors"]


def test_random_neurons_with_our_factors_are_others_with_the_same_factors(bench: Bench, mask: Mask) -> None:
    row = next(
        row for row in Rivals(bench, mask, TuningSettings()).rows() if row.name.endswith("our factors")
    )
    _, chosen = row.prepare()
    threshold = mask.levels.named["security-critical"]
    assert chosen == f"({threshold.num_safety}, {threshold.num_utility})"
    random = with_random_neurons(bench, mask)
    for drawn, ours in ((random.safety, mask.safety), (random.utility, mask.utility)):
        assert drawn.factors.tolist() == ours.factors.tolist()
        same = set(map(tuple, drawn.neurons.tolist())) & set(map(tuple, ours.neurons.tolist()))
        assert len(same) <= 3, same


def few() -> list[Record]:
    kinds = (("harmful", "grandmother"), ("harmful", None), ("borderline", None), ("benign", None))
    return [record for kind, family in kinds for record in records(kind, "tune", family)[:2]]  # type: ignore[arg-type]


def test_a_comparison_goes_on_where_it_stopped(bench: Bench, tmp_path: Path) -> None:
    prepared: list[str] = []

    def row(name: str) -> Row:
        def prepare():  # type: ignore[no-untyped-def]
            prepared.append(name)
            return nullcontext, "as it is"

        return Row(name, "base", prepare)

    out = tmp_path / "results.json"
    conditions = {"seed": 0, "mask": "5b", "settings": {"rate": 0.1, "bound": 32.0}}
    compare(bench, [row("one")], few(), out, conditions)
    found = compare(bench, [row("one"), row("two")], few(), out, conditions)
    assert prepared == ["one", "two"]
    assert found == json.loads(out.read_text())["rows"]
    assert found["one"]["metrics"] == found["two"]["metrics"]
    assert found["one"]["metrics"]["benign_correct"]["total"] == 2
    for changes, told in (
        ({"mask": "6c"}, "mask 5b, not 6c"),
        ({"split": "tune"}, "split None, not tune"),
        ({"settings": {"rate": 0.1, "bound": 8.0}}, "settings.bound 32.0, not 8.0"),
    ):
        with pytest.raises(DataError, match=rf"with {told}\. Name another"):
            compare(bench, [], few(), out, {**conditions, **changes})
    out.write_text("[]")
    with pytest.raises(DataError, match="holds no comparison"):
        compare(bench, [], few(), out, conditions)


def test_a_rival_without_a_setting_within_the_limits_is_left_out(bench: Bench, tmp_path: Path) -> None:
    def prepare() -> NoReturn:
        raise NoSettingError("None of 16 settings is mild enough.")

    rows = [Row("rash", "rival", prepare), Row("one", "base", lambda: (nullcontext, "as it is"))]
    told: list[str] = []
    out = tmp_path / "results.json"
    found = compare(bench, rows, few(), out, {}, told.append)
    assert told == ["rash", "rash: left out. None of 16 settings is mild enough.", "one"]
    assert found["rash"] == {"kind": "rival", "left_out": "None of 16 settings is mild enough."}
    lines = comparison_table([found]).splitlines()
    assert lines[2].startswith("| rash | 0 | no setting within the limits |") and len(lines) == 4
    assert lines[2].count("|") == lines[3].count("|")
    assert compare(bench, rows, few(), out, {}, told.append) == found and len(told) == 3, (
        "it is not tried again"
    )
    other = {"rash": found["one"], "one": found["one"]}
    assert comparison_table([found, other]).splitlines()[2].startswith("| rash | 1, left out for 1 | ")
    save_plot([found], tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000


def test_only_comparisons_of_the_same_conditions_and_of_other_seeds_are_put_together(tmp_path: Path) -> None:
    def written(name: str, **conditions: object) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps({"conditions": conditions, "rows": {"no change": {}}}))
        return path

    common = {"split": "tune", "settings": {"rate": 1}}
    files = [written(f"{n}.json", seed=n, prompts=f"p{n}", mask=f"m{n}", **common) for n in (0, 1)]
    assert read_comparable(files) == 2 * [{"no change": {}}]
    for other, named in (
        (written("a.json", seed=2, **{**common, "split": "heldout"}), "split heldout, .*0.json with tune"),
        (
            written("b.json", seed=2, **{**common, "settings": {"rate": 2}}),
            "settings.rate 2, .*0.json with 1",
        ),
        (written("c.json", seed=2, split="tune"), "settings None|settings.rate None"),
        (written("d.json", seed=1, **common), "1.json and .*d.json are both of seed 1"),
    ):
        for order in ([*files, other], [files[1], other]):
            with pytest.raises(DataError, match=named.replace("0.json", "[01].json")):
                read_comparable(order)


def test_the_table_gives_means_ranges_and_intervals_over_seeds() -> None:
    def run(count: int) -> dict[str, dict[str, object]]:
        rate = {"rate": count / 100, "count": count, "total": 100}
        rates = dict.fromkeys(("asr", "over_refusal", "benign_correct", "refusal_plain"), rate)
        return {"ours": {"metrics": rates, "perplexity": 1 + count / 100}}

    table = comparison_table([run(10), run(30)])
    # Wilson intervals of 40 of 200 and of 10 of 100: all p with |p - share| <= 1.96 sqrt(p (1 - p) / n)
    assert "| ours | 2 | 20.0 % (10.0 to 30.0) [15.0, 26.1] |" in table and "1.2000" in table
    assert "| ours | 1 | 10.0 % [5.5, 17.4] |" in comparison_table([run(10)])


@pytest.mark.parametrize("split", ["tune", "heldout"])
def test_adaptation_measures_prompts_that_it_was_not_given(
    split: Split, bench: Bench, mask: Mask, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Record] = []
    asked: list[Record] = []

    def adapted(_bench: Bench, begun: Mask, prompts: list[Record], _run: object) -> Mask:
        given.extend(prompts)
        return begun

    def measured(_bench: Bench, _mask: Mask, at: Threshold, prompts: list[Record]) -> dict[str, object]:
        assert at == mask.levels.named["balanced"]
        asked.extend(prompts)
        return {"asr": {}, "over_refusal": {}}

    monkeypatch.setattr("modulation.demo.fewshot._adapted", adapted)
    monkeypatch.setattr("modulation.demo.fewshot._measured", measured)
    family = {"tune": "emotion", "heldout": "debate"}[split]
    seeded = replace(bench, seed=2)
    found = adaptations(seeded, mask, split, AdaptationRun(TuningSettings(), 1), [family], level="balanced")
    assert [each.start for each in found] == ["learned", "from scratch"]
    shots = {each.prompt for each in given if each.family == family}
    assert len(shots) == NUM_SHOTS
    assert not {each.prompt for each in given} & {each.prompt for each in asked}
    assert {each.kind for each in asked} == {"harmful", "borderline"}
    known = (learning_records if split == "tune" else all_records)(2, TUNING_PROMPTS_PER_TOPIC)
    others = {each.prompt for each in given} - shots
    assert others <= {each.prompt for each in known}, "the mask was learned from them"
    assert len({each.prompt for each in given if each.kind == "borderline"}) > 100
    answers = [{each.answer for each in part if each.kind == "borderline"} for part in (given, asked)]
    assert answers[0].isdisjoint(answers[1]), "no topic is in both"


def test_on_tune_only_the_validation_families_are_adapted_to(
    bench: Bench, mask: Mask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modulation.demo.fewshot._adapted", lambda _bench, begun, *_: begun)
    monkeypatch.setattr("modulation.demo.fewshot._measured", lambda *_: {"asr": {}, "over_refusal": {}})
    run = AdaptationRun(TuningSettings(), 1)
    found = {each.family for each in adaptations(bench, mask, "tune", run)}
    assert found == set(VALIDATION_FAMILIES)
