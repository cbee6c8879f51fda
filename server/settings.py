"""What an operator can set: by flag of `neurontune serve`, by NEURONTUNE_ variable, by default.

Knows names, types and which of them go together. Knows no model, no mask, no engine. Read once, frozen.
"""

import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.errors import SettingsError

PREFIX: Final = "NEURONTUNE_"
DEMO: Final = "demo"
UNKNOWN_TO_FAKE: Final = frozenset(
    {"model", "mask", "device", "dtype", "kv_cache_tokens", "prefix_caching", "max_engine_failures"}
)

Count = Annotated[int, Field(ge=1)]


class Settings(BaseSettings):
    """Every setting. Make one with `read_settings`, whose errors are fit for users."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    model: str = Field(default=DEMO, description="Model to serve: 'demo', a folder, or a name on the hub.")
    mask: Path | None = Field(
        default=None, description="Mask file. Default: the demo model's own; required for any other model."
    )
    served_model_name: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9._:/+-]+$",
        description="Id of the model in the API. Default: the last part of --model.",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0: any free one.")
    default_level: str = Field(
        default="balanced", description="Safety level of requests that name none: a name or a number."
    )
    engine: Literal["transformers", "fake"] = Field(
        default="transformers", description="What generates; 'fake' has no model, for trying the API out."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="Where the model runs.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="The type of the model's weights in memory."
    )
    max_model_len: Count | None = Field(
        default=None, description="Most tokens of prompt and answer together. Default: the model's own."
    )
    kv_cache_tokens: Count | None = Field(
        default=None, description="Tokens that the KV cache holds. Default: 16384, on CUDA 65536."
    )
    max_num_seqs: Count = Field(default=64, description="Most requests that run at once; others wait.")
    prefix_caching: bool = Field(default=True, description="Share equal prefixes within a safety level.")
    max_engine_failures: Count = Field(
        default=3,
        description="Failures of the engine in a row, no answer between, that end the server: exit code 1.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="What is logged; 'debug' also shows tracebacks."
    )

    @field_validator("*", mode="before")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value == "":
            raise ValueError("must not be empty; leave it out to get the default")
        return value

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {"served_model_name": PurePath(str(values.get("model", DEMO))).name} | values

    @model_validator(mode="after")
    def _belong_together(self) -> "Settings":
        if self.engine == "fake":
            useless = sorted(UNKNOWN_TO_FAKE & self.model_fields_set)
            if useless:
                raise ValueError(f"the fake engine has no use for {', '.join(useless)}; leave it out")
        elif self.model != DEMO and self.mask is None:
            raise ValueError(
                f"the model {self.model!r} needs a mask file: give one with --mask, or serve the demo "
                "model. Nothing is served unmodulated"
            )
        return self


def read_settings(flags: Mapping[str, Any]) -> Settings:
    """Settings from `flags`, then the environment, then the defaults.

    Raises:
        SettingsError: an unknown NEURONTUNE_ variable, or a value that is not accepted.
    """
    known = [variable(name) for name in Settings.model_fields]
    for name in sorted(os.environ):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            raise SettingsError(f"Variable {name} is not a setting. Known: {', '.join(known)}.")
    try:
        return Settings(**flags)
    except ValidationError as error:
        raise SettingsError(f"{'; '.join(_sentence(one) for one in error.errors())}.") from error


def flag(name: str) -> str:
    """The flag of `neurontune serve` for the setting `name`."""
    return f"--{name.replace('_', '-')}"


def variable(name: str) -> str:
    """The environment variable for the setting `name`."""
    return f"{PREFIX}{name.upper()}"


def _sentence(error: ErrorDetails) -> str:
    said = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if not error["loc"]:
        return f"Settings: {said}"
    name = str(error["loc"][0])
    if name not in Settings.model_fields:
        return f"Setting {name} does not exist"
    return f"Setting {name} ({flag(name)}, {variable(name)}) {said}, not {error['input']!r}"
