"""What `neurontune tune` and `neurontune levels` refuse, each in one sentence."""

from dataclasses import replace
from pathlib import Path

import pytest

from modulation.attribution.scores import ScoresFile
from modulation.demo import MASK_FILE
from modulation.masks import Mask
from tests.tiny_models import tiny_chat_folder
from tests.tuning.commanding import ATTACKS, invoke, lines_of, tune, without

BAD_DATA = {
    "empty": (lambda _: "", "holds no prompts"),
    "a missing field": (lambda _: '{"id": "a", "kind": "benign"}', "field 'prompt' is missing"),
    "a family with one prompt": (
        lambda data: f"{lines_of(data, *ATTACKS[0])[0]}\n{without(ATTACKS[0])(data)}",
        "Attack family 'few_shot' has 1 prompt",
    ),
    "no families": (without(*ATTACKS), "no attacked prompts"),
    "one family": (without(*ATTACKS[1:]), "few_shot are kept aside for validation, and none is left"),
    "two families": (without(ATTACKS[2]), "needs at least 2 attack families to learn from"),
    "no borderline": (without(("borderline", None)), "The data have 0 borderline prompts"),
    "no benign": (without(("benign", None)), "The data have 0 benign prompts"),
    "no plain harmful": (without(("harmful", None)), "The data have 0 plain harmful prompts"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_data_that_cannot_be_learned_from_are_refused_in_one_sentence(
    name: str, data: Path, scores: Path, tmp_path: Path
) -> None:
    make, words = BAD_DATA[name]
    path = tmp_path / "bad.jsonl"
    path.write_text(make(data))
    result = tune(path, scores, "--out", tmp_path / "mask.safetensors")
    assert result.exit_code == 1 and words in result.stderr
    assert sum(line.startswith("neurontune: ") for line in result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--option", "step=1"], "'step' is unknown; accepted: method, second_order, inner_steps"),
        (["--option", "rate"], "'rate' has no '='"),
        (["--option", "bound=1"], "Option bound='1': Input should be greater than 1"),
        (["--option", "method=guess"], "Option method='guess': Input should be 'maml' or 'erm'"),
        (["--option", "rate=nan"], "Option rate='nan'"),
        (["--validation-family", "poem"], "'poem': no harmful prompt has this family; there are few_shot"),
        (["--validation-family", "x", "--validation", "y"], "--validation-family does not go with"),
        (["--share", "0"], "--share 0: a share above 0 and up to 1"),
        (["--share", "nan"], "--share nan: a share above 0"),
        (["--share", "0.0001"], "share of 0.0001 is 0 of 3840 neurons"),
        (["--share", "0.1", "--num-safety", "3", "--num-utility", "3"], "--share does not go with"),
        (["--num-safety", "3"], "--num-safety is given alone"),
        (["--num-safety", "9999", "--num-utility", "9"], "9999 were asked for"),
        (["--adapt"], "--scores does not go with --adapt"),
        (["--mask", "x"], "--mask needs --adapt"),
        (["--steps", "2"], "--steps needs --adapt"),
        (["--rate", "2"], "--rate needs --adapt"),
        (["--out", "/no/such/folder/x"], "the folder /no/such/folder does not exist"),
        (["--out", "."], "is a folder; a file is needed"),
        (["--model", "/no/such/model"], "Model folder '/no/such/model' does not exist"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_one_sentence(
    data: Path, scores: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    out = [] if "--out" in arguments else ["--out", tmp_path / "mask.safetensors"]
    result = tune(data, scores, *out, *arguments)
    assert result.exit_code == 1 and words in result.stderr
    assert sum(line.startswith("neurontune: ") for line in result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tune"], "--scores is missing"),
        (["tune", "--scores", "/no/file"], "Scores file /no/file cannot be read"),
        (["tune", "--adapt"], "--mask is missing"),
        (["tune", "--adapt", "--mask", "/no/file"], "Mask file /no/file cannot be read"),
        (["tune", "--adapt", "--mask", MASK_FILE, "--rate", "0"], "--rate 0: a number above 0"),
        (["tune", "--adapt", "--mask", MASK_FILE, "--num-safety", "3"], "--num-safety does not go with"),
        (["levels", "--mask", "/no/file"], "Mask file /no/file cannot be read"),
        (["levels", "--mask", MASK_FILE, "--attacks", "poem"], "'poem'"),
        (["levels", "--mask", MASK_FILE, "--kind", "benign"], "where field 'kind' of each says it"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_named(
    data: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    result = invoke(*arguments, "--data", data, "--out", tmp_path / "mask.safetensors")
    assert result.exit_code == 1 and words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_scores_and_masks_of_another_model_are_refused(
    data: Path, scores: Path, tuned: tuple[Path, str], tmp_path: Path
) -> None:
    found, mask = ScoresFile.load(scores), Mask.load(tuned[0])
    changed = {"model_fingerprint": "0" * 16}
    other_scores, other_mask, out = (tmp_path / name for name in ("scores", "mask", "out"))
    replace(found, metadata=found.metadata.model_copy(update=changed)).save(other_scores)
    replace(mask, metadata=mask.metadata.model_copy(update=changed)).save(other_mask)
    results = [
        tune(data, other_scores, "--out", out),
        invoke("tune", "--adapt", "--mask", other_mask, "--data", data, "--out", out),
        invoke("levels", "--mask", other_mask, "--data", data, "--out", out),
    ]
    for result, what in zip(results, ("scores file", "mask", "mask"), strict=True):
        assert result.exit_code == 1 and f"The {what} was made for weights with fingerprint" in result.stderr
    assert not out.exists()


def test_a_model_without_a_chat_template_is_refused(data: Path, scores: Path, tmp_path: Path) -> None:
    folder = tiny_chat_folder(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    out = ["--model", folder, "--out", tmp_path / "mask"]
    for result in (
        tune(data, scores, *out),
        invoke("levels", "--mask", MASK_FILE, "--data", data, *out),
    ):
        assert result.exit_code == 1 and "has no chat template" in result.stderr


def test_levels_say_which_prompts_they_lack_before_the_model_is_read(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text(without(*ATTACKS)(data))
    result = invoke("levels", "--mask", MASK_FILE, "--data", path, "--out", tmp_path / "mask")
    assert result.exit_code == 1 and "no attacked prompts" in result.stderr
    assert "device" not in result.stdout
