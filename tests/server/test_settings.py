"""Settings: where they come from, what is refused, and how that is said."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from server import cli
from server.app import create_app
from server.engines.fake import FakeEngine
from server.errors import SettingsError
from server.settings import Settings, read_key, read_settings


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"NEURONTUNE_{name.upper()}", raising=False)


def test_defaults_serve_the_demo_model_on_loopback() -> None:
    settings = read_settings({})
    assert (settings.model, settings.served_model_name, settings.mask) == ("demo", "demo", None)
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)


def test_a_flag_beats_a_variable_beats_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONTUNE_PORT", "9000")
    monkeypatch.setenv("neurontune_max_num_seqs", "3")
    assert read_settings({}).port == 9000
    assert read_settings({}).max_num_seqs == 3
    assert read_settings({"port": "9001"}).port == 9001


def test_an_unknown_variable_is_an_error_that_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONTUNE_DEFUALT_LEVEL", "off")
    with pytest.raises(SettingsError, match=r"NEURONTUNE_DEFUALT_LEVEL is not a setting.*DEFAULT_LEVEL"):
        read_settings({})


UPSTREAM = {"engine": "upstream", "upstream": "http://up:8001/v1", "mask": "m.safetensors"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"port": "abc"}, "--port, NEURONTUNE_PORT"), ({"port": "65536"}, "65535"), ({"port": "-1"}, "port"),
        ({"max_num_seqs": "0"}, "--max-num-seqs"), ({"max_model_len": "0"}, "--max-model-len"),
        ({"kv_cache_tokens": "many"}, "many"), ({"device": "tpu"}, "'auto', 'cpu' or 'cuda'"),
        ({"dtype": "int8"}, "bfloat16"), ({"engine": "gpt"}, "'transformers', 'vllm', 'upstream' or 'fake'"),
        ({"log_level": "loud"}, "debug"), ({"prefix_caching": "perhaps"}, "--prefix-caching"),
        ({"mask": ""}, "must not be empty"), ({"model": ""}, "must not be empty"),
        ({"colour": "red"}, "colour"), ({"cors_origins": "app.example"}, "--cors-origins"),
        ({"served_model_name": "a@b"}, "served_model_name"), ({"served_model_name": "a b"}, "'a b'"),
        ({"model": "some/model"}, "--mask"), ({"model": "."}, "served_model_name"),
        ({"engine": "fake", "mask": "m.safetensors"}, "no use for mask"),
        ({"engine": "fake", "cuda_graphs": "false"}, "no use for cuda_graphs"),
        ({"engine": "fake", "model": "some/model", "dtype": "float16"}, "no use for dtype, model"),
        ({"engine": "upstream", "upstream": "http://up"}, "--mask"),
        ({"engine": "upstream", "mask": "m"}, "--upstream"),
        ({"upstream": "http://up"}, "only the engine 'upstream'"),
        ({"adapter": "balanced=b"}, "adapter; leave it"),
        ({**UPSTREAM, "device": "cpu"}, "no use for device"),
        ({**UPSTREAM, "cuda_graphs": "false"}, "no use for cuda_graphs"),
        ({**UPSTREAM, "compile": "true"}, "no use for compile"),
        ({**UPSTREAM, "model": "m"}, "no use for model"),
        ({**UPSTREAM, "upstream": "up:1"}, "--upstream"),
        ({**UPSTREAM, "upstream": "http://me:it@up"}, "--upstream"),
        ({**UPSTREAM, "adapter": "b"}, "--adapter"),
        ({**UPSTREAM, "adapter": "a=b,a=c"}, "a level twice"),
        ({"quantization": "fp8"}, "only the vllm engine knows quantization"),
        ({"engine": "fake", "vllm_arg": ["a=1"]}, "no use for vllm_arg"),
        ({"engine": "vllm", "lora": ["a=x", ""]}, "must not be empty"),
        ({"engine": "vllm", "vllm_arg": [""]}, "must not be empty"),
        ({"cors_origins": [""]}, "must not be empty"),
        ({**UPSTREAM, "tensor_parallel_size": "2"}, "no use for tensor_parallel_size"),
        ({"engine": "vllm", "max_engine_failures": "2"}, "leave max_engine_failures out"),
        ({"engine": "vllm", "cuda_graphs": "false"}, "enforce_eager=true"),
        ({"engine": "vllm", "compile": "true"}, "optimization_level=NUMBER"),
        ({"engine": "fake", "compile": "true"}, "no use for compile"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError) as refused:
        read_settings(flags)
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("model", "name"), [("demo", "demo"), ("Qwen/Qwen2.5-0.5B", "Qwen2.5-0.5B"), ("/a/my-model/", "my-model")]
)
def test_the_served_name_is_the_last_part_of_the_model(model: str, name: str) -> None:
    settings = read_settings({"model": model, "mask": "m.safetensors"})
    assert settings.served_model_name == name and settings.mask == Path("m.safetensors")


def test_the_served_name_is_the_last_part_of_the_upstreams_model_and_that_is_the_served_name() -> None:
    settings = read_settings(
        {**UPSTREAM, "upstream_model": "Qwen/Qwen2.5-0.5B", "adapter": "balanced=a, off=b"}
    )
    assert settings.served_model_name == "Qwen2.5-0.5B" and settings.adapter == ("balanced=a", "off=b")
    assert read_settings(UPSTREAM).served_model_name == "demo"


@pytest.mark.parametrize(
    ("contents", "words"),
    [(None, "cannot be read: No such file"), (b"", "one key"), (b"a b", "one key"), (b"\xff", "no key has")],
)
def test_a_key_file_that_holds_no_key_is_refused(tmp_path: Path, contents: bytes | None, words: str) -> None:
    file = tmp_path / "key"
    if contents is not None:
        file.write_bytes(contents)
    with pytest.raises(SettingsError, match=words):
        read_key(file)


def test_a_key_file_holds_one_line(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("sk-abc\n")
    assert read_key(tmp_path / "key") == "sk-abc"


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1


@pytest.mark.parametrize("level", ["nope", "129", "-1", "Balanced"])
def test_a_default_level_the_mask_does_not_offer_is_refused_at_start(level: str) -> None:
    settings = Settings(engine="fake", default_level=level)
    with pytest.raises(SettingsError, match=r"default_level.*utility-priority"):
        create_app(settings, FakeEngine())


def test_a_flag_that_was_given_several_times_has_each_of_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(flags: dict[str, Any]) -> Settings:
        seen.append(read_settings(flags))
        raise SettingsError("enough was seen")

    seen: list[Settings] = []
    monkeypatch.setattr("server.cli.read_settings", read)
    flags = [
        "--lora",
        "a=x,y",
        "--lora",
        "b=z",
        "--cors-origins",
        "http://a, http://b",
        "--cors-origins",
        "*",
    ]
    CliRunner().invoke(cli.app, ["serve", "--engine", "vllm", *flags])
    (settings,) = seen
    assert settings.lora == ("a=x,y", "b=z")
    assert settings.cors_origins == ("http://a", "http://b", "*")


def test_further_arguments_of_vllm_are_lines_of_a_variable_or_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their values may be JSON, so nothing in them can separate them."""
    expected = ('compilation_config={"level": 3, "mode": 1}', "seed=1")
    assert read_settings({"engine": "vllm", "vllm_arg": list(expected)}).vllm_arg == expected
    monkeypatch.setenv("NEURONTUNE_VLLM_ARG", "\n".join(expected))
    assert read_settings({"engine": "vllm"}).vllm_arg == expected
