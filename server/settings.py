"""What an operator can set: by flag of `neurontune serve`, by NEURONTUNE_ variable, by default.

Knows names, types and which of them go together. Knows no model, no mask, no engine. Read once, frozen.
"""

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from modulation.files import read_regular
from server.errors import SettingsError

PREFIX: Final = "NEURONTUNE_"
MAX_KEY_BYTES: Final = 4096
DEMO: Final = "demo"
UNKNOWN_TO_FAKE: Final = frozenset(
    {"model", "mask", "device", "dtype", "kv_cache_tokens", "prefix_caching", "max_engine_failures"}
    | {"cuda_graphs", "compile", "trust_remote_code", "allow_less_safe_levels"}
)
ONLY_VLLM: Final = frozenset(
    {"tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "distributed_executor_backend"}
    | {"quantization", "gpu_memory_utilization", "lora", "vllm_arg"}
)
UNKNOWN_TO_UPSTREAM: Final = frozenset(
    {
        "model",
        "device",
        "dtype",
        "kv_cache_tokens",
        "prefix_caching",
        "cuda_graphs",
        "compile",
        "max_engine_failures",
        "trust_remote_code",
    }
)
UPSTREAM_ONLY: Final = frozenset(
    {"upstream", "upstream_model", "upstream_key_file", "upstream_timeout_seconds", "adapter"}
)
AUDIT_ONLY: Final = frozenset({"audit_max_bytes", "audit_keep", "audit_prompts"})

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _listed(given: Any) -> Any:
    return [each.strip() for text in _texts(given) for each in text.split(",")]


def _lines(given: Any) -> Any:
    return [each for text in _texts(given) for each in text.splitlines() if each.strip()]


def _texts(given: Any) -> Any:
    """A variable is one text, a flag as many as it was given times."""
    return [given] if isinstance(given, str) else given


Lines = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_lines)]
Origin = Annotated[str, Field(pattern=r"^(\*|https?://[^/\s,]+)$")]
Host = Annotated[str, Field(pattern=r"^[^/\s,:\[\]]+$")]
Hosts = Annotated[tuple[Host, ...], NoDecode, BeforeValidator(_listed)]
Origins = Annotated[tuple[Origin, ...], NoDecode, BeforeValidator(_listed)]
Adapter = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*=[^=,\s]+$")]
Adapters = Annotated[tuple[Adapter, ...], NoDecode, BeforeValidator(_listed)]
Url = Annotated[str, Field(pattern=r"^https?://[^/\s@?#]+[^\s@?#]*$")]


class Settings(BaseSettings):
    """Every setting. Make one with `read_settings`, whose errors are fit for users."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    model: str = Field(default=DEMO, description="Model to serve: 'demo', a folder, or a name on the hub.")
    mask: Path | None = Field(
        default=None, description="Mask file. Default: the demo model's own; required for any other model."
    )
    mask_dir: Path | None = Field(
        default=None,
        description="Folder that POST /admin/mask takes masks from. Default: the mask file's own.",
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
    keys: Path | None = Field(
        default=None, description="Key file; without one only loopback is served. SIGHUP reads it again."
    )
    default_floor: str = Field(
        default="balanced", description="Least safe level that keys without a floor may ask for."
    )
    public_metrics: bool = Field(default=False, description="Let /metrics be read without a key.")
    open_to_anyone: bool = Field(
        default=False, description="Serve whoever reaches the address, without keys, at the default floor."
    )
    audit_log: str | None = Field(
        default=None, description="File that says who asked for what at which level; '-': stdout."
    )
    audit_max_bytes: Count = Field(
        default=100 * 2**20, description="Bytes after which the audit log goes on in a new file."
    )
    audit_keep: Count = Field(default=10, description="How many older files of the audit log are kept.")
    audit_prompts: bool = Field(
        default=False, description="Also write the beginning of prompts to the audit log, redacted."
    )
    otlp_endpoint: Url | None = Field(
        default=None, description="OpenTelemetry collector that gets traces, by OTLP over HTTP."
    )
    engine: Literal["transformers", "vllm", "upstream", "fake"] = Field(
        default="transformers",
        description="What generates; 'vllm': at scale; 'upstream': another server; 'fake': nothing.",
    )
    upstream: Url | None = Field(
        default=None, description="Address of the server that generates, for --engine upstream."
    )
    upstream_model: str | None = Field(
        default=None, description="Its name for the base model. Default: --served-model-name."
    )
    upstream_key_file: Path | None = Field(default=None, description="File that holds the key for it.")
    adapter: Adapters = Field(
        default=(),
        description="LEVEL=NAME: its name for a level's adapter, several with commas. Default: BASE-LEVEL.",
    )
    upstream_timeout_seconds: Seconds = Field(
        default=120, description="Longest that it may say nothing in an answer."
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
    max_num_waiting: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Most requests that wait; others get 429. Default: 4 times --max-num-seqs."
    )
    max_waiting_tokens: Count = Field(
        default=65536, description="Most tokens of prompts whose answers have not begun; others get 429."
    )
    request_timeout_seconds: Seconds = Field(
        default=600, description="Longest that a request may take, and no X-Request-Timeout can exceed."
    )
    read_timeout_seconds: Seconds = Field(
        default=30, description="Longest that a request's head, and then its body, may take to arrive."
    )
    keep_alive_seconds: Count = Field(
        default=120, description="Longest that a connection may stay idle between two requests."
    )
    max_connections: Count = Field(
        default=1024, description="Most connections, idle ones too; beyond that one is closed, with 429."
    )
    max_body_bytes: Count = Field(default=4 * 2**20, description="Most bytes of a request's body.")
    max_messages: Count = Field(default=2048, description="Most messages of a conversation.")
    grace_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=30, description="Seconds that running requests have to end after SIGTERM."
    )
    tensor_parallel_size: Count = Field(default=1, description="vLLM: GPUs that share each layer.")
    pipeline_parallel_size: Count = Field(
        default=1, description="vLLM: groups of GPUs that share the layers."
    )
    data_parallel_size: Count = Field(default=1, description="vLLM: copies of the model that share requests.")
    distributed_executor_backend: Literal["mp", "ray"] | None = Field(
        default=None,
        description="vLLM: processes on this machine, or Ray for several. Default: vLLM's choice.",
    )
    quantization: str | None = Field(
        default=None, description="vLLM: how weights are kept, for example fp8. Default: as the model says."
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="vLLM: share of each GPU's memory that it may take. Default: vLLM's own."
    )
    lora: Lines = Field(
        default=(),
        description="vLLM: a LoRA adapter that requests may ask for as a model, as NAME=FOLDER; may be given "
        "several times.",
    )
    vllm_arg: Lines = Field(
        default=(), description="vLLM: any further engine argument, as KEY=VALUE; may be given several times."
    )
    prefix_caching: bool = Field(default=True, description="Share equal prefixes within a safety level.")
    cuda_graphs: bool = Field(
        default=True, description="Transformers, on CUDA: record steps that are alike once and replay them."
    )
    compile: bool = Field(
        default=False,
        description="Transformers: compile the model at the start, for faster steps. Needs a C++ compiler.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with the model. Only for models you trust."
    )
    allow_less_safe_levels: bool = Field(
        default=False,
        description="Serve a mask whose recorded evaluation says that a level is less safe than its name.",
    )
    cors_origins: Origins = Field(
        default=(),
        description="Origins whose web pages may call this server, separated by commas. Default: none.",
    )
    allowed_hosts: Hosts = Field(
        default=(),
        description="Names that requests may be sent to beside localhost, separated by commas. Default: "
        "without keys on loopback none, else any.",
    )
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
        if value == "" or (isinstance(value, list | tuple) and "" in value):
            raise ValueError("must not be empty; leave it out to get the default")
        return value

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: dict[str, Any]) -> dict[str, Any]:
        named_after = values.get("upstream_model") or values.get("model", DEMO)
        return {"served_model_name": PurePath(str(named_after)).name} | values

    @model_validator(mode="after")
    def _belong_together(self) -> "Settings":
        if self.engine == "fake":
            useless = sorted((UNKNOWN_TO_FAKE | ONLY_VLLM) & self.model_fields_set)
            if useless:
                raise ValueError(f"the fake engine has no use for {', '.join(useless)}; leave it out")
        elif self.engine == "upstream":
            self._check_upstream()
        elif self.model != DEMO and self.mask is None:
            raise ValueError(
                f"the model {self.model!r} needs a mask file: give one with --mask, or serve the demo "
                "model. Nothing is served unmodulated"
            )
        useless = sorted(UPSTREAM_ONLY & self.model_fields_set) if self.engine != "upstream" else []
        if useless:
            raise ValueError(f"only the engine 'upstream' has a use for {', '.join(useless)}; leave it out")
        return self

    def _check_upstream(self) -> None:
        useless = sorted((UNKNOWN_TO_UPSTREAM | ONLY_VLLM) & self.model_fields_set)
        if useless:
            raise ValueError(f"the engine 'upstream' has no use for {', '.join(useless)}; leave it out")
        if self.upstream is None or self.mask is None:
            raise ValueError(
                "the engine 'upstream' needs the server's address, --upstream, and the mask that its "
                "adapters were exported from, --mask"
            )
        levels = [each.partition("=")[0] for each in self.adapter]
        if len(set(levels)) < len(levels):
            raise ValueError("adapter names a level twice")

    @model_validator(mode="after")
    def _fit_the_engine(self) -> "Settings":
        if self.engine == "transformers" and (useless := sorted(ONLY_VLLM & self.model_fields_set)):
            raise ValueError(f"only the vllm engine knows {', '.join(useless)}; leave it out")
        if self.engine == "vllm" and "max_engine_failures" in self.model_fields_set:
            raise ValueError(
                "the vllm engine ends the server at its first failure: leave max_engine_failures out"
            )
        if self.engine == "vllm" and "cuda_graphs" in self.model_fields_set:
            raise ValueError(
                "cuda_graphs is for the transformers engine; vLLM's own are switched off by "
                "vllm_arg enforce_eager=true"
            )
        if self.engine == "vllm" and "compile" in self.model_fields_set:
            raise ValueError(
                "compile is for the transformers engine; how vLLM compiles is set by vllm_arg "
                "optimization_level=NUMBER"
            )
        return self

    @model_validator(mode="after")
    def _guarded(self) -> "Settings":
        if self.keys is not None and self.open_to_anyone:
            raise ValueError("open_to_anyone is for a server without keys; leave one of them out")
        if self.keys is None and not self.open_to_anyone:
            if not _is_loopback(self.host):
                raise ValueError(
                    f"host {self.host!r} is not loopback, and without keys whoever reaches it may ask. Give "
                    "a key file with --keys (neurontune keys add makes one), or say --open-to-anyone"
                )
            if "default_floor" in self.model_fields_set:
                raise ValueError("default_floor would bind nobody: give a key file with --keys")
        if self.keys is None and self.public_metrics:
            raise ValueError("public_metrics is for a server with keys; without, everything is public")
        useless = sorted(AUDIT_ONLY & self.model_fields_set) if self.audit_log is None else []
        if useless:
            raise ValueError(f"without audit_log there is no use for {', '.join(useless)}; leave it out")
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


def read_key(file: Path) -> str:
    """The key in `file`: its one line. Raises SettingsError, which does not quote it."""
    where = f"Setting upstream_key_file ({flag('upstream_key_file')}): {file}"
    try:
        key = read_regular(file, MAX_KEY_BYTES).decode("ascii").strip()
    except OSError as error:
        raise SettingsError(f"{where} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{where} holds characters that no key has.") from error
    if not key or any(not each.isprintable() or each.isspace() for each in key):
        raise SettingsError(f"{where} must hold one key on one line, and nothing else.")
    return key


def flag(name: str) -> str:
    """The flag of `neurontune serve` for the setting `name`."""
    return f"--{name.replace('_', '-')}"


def variable(name: str) -> str:
    """The environment variable for the setting `name`."""
    return f"{PREFIX}{name.upper()}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _sentence(error: ErrorDetails) -> str:
    said = error["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if not error["loc"]:
        return f"Settings: {said}"
    name = str(error["loc"][0])
    if name not in Settings.model_fields:
        return f"Setting {name} does not exist"
    return f"Setting {name} ({flag(name)}, {variable(name)}) {said}, not {error['input']!r}"
