"""The commands accept what they document and refuse the rest with exit code 2 and a list."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from modulation.demo import MASK_FILE
from modulation.demo.commands import app
from modulation.demo.corpus import family_names
from modulation.demo.masking import PRUNED
from modulation.evaluation.data import read_records
from modulation.masks import Mask, MaskMetadata
from modulation.tuning.runs import AdaptationRun
from modulation.tuning.settings import ADAPTATION_MARGIN, TuningSettings

FIELDS = ["id", "prompt", "kind", "family", "split", "check"]


def _lines(*arguments: str) -> list[dict[str, object]]:
    result = CliRunner().invoke(app, ["data", *arguments])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("split", ["train", "tune", "heldout"])
@pytest.mark.parametrize("kind", ["harmful", "benign", "borderline"])
def test_data_prints_records_of_the_split_and_kind_asked_for(split: str, kind: str) -> None:
    found = _lines("--split", split, "--kind", kind)
    assert all(list(fields) == FIELDS for fields in found)
    assert {(fields["split"], fields["kind"]) for fields in found} == {(split, kind)}
    assert {fields["family"] for fields in found} == {None, *family_names(kind, split)}  # type: ignore[arg-type]
    assert len({fields["id"] for fields in found}) == len(found)


def test_data_prints_one_family_or_none_a_limit_and_prompts_a_topic() -> None:
    split = "--split", "heldout", "--kind", "harmful"
    assert {fields["family"] for fields in _lines(*split, "--family", "json")} == {"json"}
    plain = _lines(*split, "--family", "none")
    assert {fields["family"] for fields in plain} == {None}
    assert len(_lines(*split, "--family", "none", "--per-topic", "4")) == 4 * len(plain)
    assert len(_lines(*split, "--limit", "11")) == 11
    assert _lines(*split, "--seed", "1") == _lines(*split, "--seed", "1") != _lines(*split)


def test_data_prints_answers_where_they_are_asked_for() -> None:
    (first, *_), (bare, *_) = (
        _lines("--split", "tune", "--kind", "benign", *more) for more in (["--answers"], [])
    )
    assert list(first) == [*FIELDS, "answer"]
    answer = str(first.pop("answer"))
    assert first == bare
    assert answer.startswith("Here is how to") and all(p in answer for p in first["check"]["phrases"])  # type: ignore[index]


def test_what_data_prints_can_be_read(tmp_path) -> None:  # type: ignore[no-untyped-def]
    printed = CliRunner().invoke(app, ["data", "--split", "tune", "--kind", "borderline"]).stdout
    (tmp_path / "x.jsonl").write_text(printed, encoding="utf-8")
    assert len(read_records(tmp_path / "x.jsonl")) == len(printed.splitlines())


@pytest.mark.parametrize(
    ("arguments", "accepted"),
    [
        (["--split", "test", "--kind", "harmful"], ["train", "tune", "heldout"]),
        (["--split", "tune", "--kind", "evil"], ["harmful", "benign", "borderline"]),
        (["--split", "tune", "--kind", "harmful", "--family", "json"], ["none", "grandmother", "few_shot"]),
        (["--split", "tune", "--kind", "harmful", "--limit", "0"], ["greater than or equal to 1"]),
        (["--split", "tune", "--kind", "harmful", "--color", "red"], ["No such option"]),
    ],
)
def test_unknown_values_are_refused_with_what_is_accepted(arguments: list[str], accepted: list[str]) -> None:
    result = CliRunner().invoke(app, ["data", *arguments])
    assert result.exit_code == 2
    for word in accepted:
        assert word in result.output


def test_evaluate_refuses_a_folder_without_a_model(tmp_path) -> None:  # type: ignore[no-untyped-def]
    result = CliRunner().invoke(app, ["evaluate", "--model", str(tmp_path)])
    assert result.exit_code == 2
    assert "config.json" in result.output


def test_compare_refuses_a_row_that_there_is_not(tmp_path: Path) -> None:
    arguments = ["--only", "no change", "--only", "steering"]
    result = CliRunner().invoke(app, ["compare", *arguments, "--out", str(tmp_path / "out.json")])
    assert result.exit_code == 2 and not list(tmp_path.iterdir())
    told = " ".join(result.output.replace("│", " ").split())
    assert "no row is named 'steering'" in told and "steering vector" in told


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda metadata: metadata.seeds.pop("tuning"), "does not say by what seed it was"),
        (
            lambda metadata: metadata.method["validation"].pop("settings"),
            "does not say by what settings it was",
        ),
        (lambda metadata: metadata.method["validation"]["settings"].update(gone=3), "tuned with gone too"),
    ],
    ids=["no seed", "no settings", "a setting that is no more"],
)
def test_compare_needs_a_mask_that_says_how_it_was_made(
    change: Callable[[MaskMetadata], object], named: str, tmp_path: Path
) -> None:
    mask = Mask.load(MASK_FILE)
    change(mask.metadata)
    mask.save(tmp_path / "mask.safetensors")
    arguments = ["--mask", str(tmp_path / "mask.safetensors"), "--out", str(tmp_path / "out.json")]
    result = CliRunner().invoke(app, ["compare", *arguments])
    assert result.exit_code == 2 and not (tmp_path / "out.json").exists()
    assert named in " ".join(result.output.replace("│", " ").split())


def test_compare_asks_as_many_draws_as_it_is_told_and_writes_down_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, object]] = []

    def measured(
        _bench: object, rows: list[Any], records: list[Any], _out: Path, conditions: Any, *_: Any
    ) -> Any:
        assert [row.name for row in rows] == ["no change"]
        asked.append((len(records), conditions.get("draws")))
        return {}

    monkeypatch.setattr("modulation.demo.commands.compare_rows", measured)
    for more in ([], ["--draws", "1"], ["--draws", "2"]):
        arguments = ["compare", "--only", "no change", "--out", str(tmp_path / "out.json"), *more]
        assert CliRunner().invoke(app, arguments).exit_code == 0
    (once, _), *_ = asked
    assert asked[:2] == [(once, None)] * 2
    assert asked[2][1] == 2 and 1.4 * once < asked[2][0] < 2 * once
    assert CliRunner().invoke(app, ["compare", "--draws", "0"]).exit_code == 2


def test_adapt_goes_on_with_the_settings_of_the_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = Mask.load(MASK_FILE)
    mask.metadata.method["validation"]["settings"] |= {"gone_since": 3}
    mask.metadata.method["tuning"]["settings"] |= {
        **{"support_size": 7, "gone_since": 3, "attacked_margin": 2.0, "borderline_weight": 0.0}
    }
    mask.save(tmp_path / "mask.safetensors")
    given: list[AdaptationRun] = []

    def adaptations(*arguments: Any) -> list[Any]:
        given.extend(each for each in arguments if isinstance(each, AdaptationRun))
        return []

    monkeypatch.setattr("modulation.demo.commands.adaptations", adaptations)
    result = CliRunner().invoke(app, ["adapt", "--mask", str(tmp_path / "mask.safetensors")])
    assert result.exit_code == 0, result.output
    assert "tuned with gone_since=3 too, which is no option any more" in result.output
    (settings,) = (each.settings for each in given)
    assert settings.support_size == 7
    assert settings.attacked_margin == ADAPTATION_MARGIN and settings.borderline_weight == 1.0
    assert settings.prune_shares == TuningSettings.parse([], PRUNED).prune_shares


def test_masks_share_their_levels_and_keep_their_names(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    mask = Mask.load(MASK_FILE)
    method = {name: value for name, value in mask.metadata.method.items() if name != "shared_levels"}
    files = [own / f"mask-{seed}.safetensors" for seed in (0, 1)]
    for seed, file in enumerate(files):
        metadata = mask.metadata.model_copy(update={"method": method, "seeds": {"tuning": seed}})
        replace(mask, metadata=metadata).save(file)
    shared = tmp_path / "shared"
    result = CliRunner().invoke(app, ["share-levels", *map(str, files), "--out-dir", str(shared)])
    assert result.exit_code == 0, result.output
    found = [Mask.load(shared / file.name) for file in files]
    assert found[0].levels.named == found[1].levels.named
    for made in found:
        rates = [each["metrics"]["asr"] for each in made.metadata.evaluation["curve"]]
        own_rates = [each["metrics"]["asr"] for each in mask.metadata.evaluation["curve"]]
        assert [each["total"] for each in rates] == [2 * each["total"] for each in own_rates]
    (tmp_path / "file").touch()
    twice = [*map(str, files), str(files[0])]
    for arguments, said in (
        ([*twice, "--out-dir", str(shared)], "the same file name"),
        ([*map(str, files), "--out-dir", str(own)], "their own curves would be lost"),
        ([*map(str, files), "--out-dir", str(tmp_path / "file")], "is no folder"),
    ):
        before = {file: file.read_bytes() for file in files}
        result = CliRunner().invoke(app, ["share-levels", *arguments])
        told = " ".join(result.output.replace("│", " ").split())
        assert result.exit_code == 2 and said in told
        assert before == {file: file.read_bytes() for file in files}


def test_adapt_refuses_a_level_that_the_mask_does_not_have() -> None:
    result = CliRunner().invoke(app, ["adapt", "--level", "strict"])
    told = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2 and "no level is named 'strict'; accepted: security-critical" in told
