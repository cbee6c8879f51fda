"""vLLM's engine arguments: those that the server's own settings stand for, and any others by name.

Knows `AsyncEngineArgs`. Knows no requests.
"""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import torch
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform

from modulation.errors import ModelError
from modulation.loading import Resolved
from server.engines.sizes import Sizes
from server.engines.vllm_adapters import Adapters

WORKER: Final = "server.engines.vllm_worker.NeuronTuneWorker"
# Part of the key under which vLLM keeps compiled models: one compiled without modulation is never taken.
_COMPILED_WITH: Final = {"neurontune": 1}
_OURS: Final = frozenset(
    {"model", "tokenizer", "worker_cls", "worker_extension_cls", "additional_config", "load_format"}
    | {"skip_tokenizer_init", "structured_outputs_config", "logprobs_mode", "tokenizer_mode", "dtype"}
    | {"max_model_len", "max_num_seqs", "enable_prefix_caching", "trust_remote_code", "served_model_name"}
    | {"enable_lora", "max_loras", "max_lora_rank"}
)
_HAVE_FLAGS: Final = frozenset(
    {"tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "quantization"}
    | {"distributed_executor_backend", "gpu_memory_utilization", "lora"}
)


@dataclass(frozen=True)
class VllmArguments:
    """What is asked of vLLM. None: vLLM's own default. `lora` are adapters as NAME=FOLDER, `others` any
    further arguments of its, as KEY=VALUE, the value as JSON or as it stands.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    distributed_executor_backend: str | None = None
    quantization: str | None = None
    gpu_memory_utilization: float | None = None
    lora: Sequence[str] = ()
    others: Sequence[str] = ()

    @property
    def details(self) -> dict[str, str]:
        """As text, what differs from the defaults."""
        default = VllmArguments()
        named = {name: getattr(self, name) for name in sorted(_HAVE_FLAGS)}
        told = {name: str(value) for name, value in named.items() if value != getattr(default, name)}
        told |= {"lora": " ".join(self.lora)} if self.lora else {}
        return told | ({"vllm_arg": " ".join(self.others)} if self.others else {})


def prepare_environment() -> None:
    """What vLLM reads from the environment of its processes, where nothing else is said there. Its model
    runner V1 is pinned: modulation is written for it, and a worker that finds another refuses to start."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("vllm").setLevel(logging.WARNING)
    for name, value in (
        ("VLLM_LOGGING_LEVEL", "WARNING"),
        ("VLLM_NO_USAGE_STATS", "1"),
        ("VLLM_WORKER_MULTIPROC_METHOD", "spawn"),
    ):
        os.environ.setdefault(name, value)


def device_of_vllm(device: str) -> Resolved:
    """`cpu` or `cuda`: what the installed vLLM was built for. Raises ModelError where it is another."""
    built_for = "cpu" if current_platform.is_cpu() else "cuda"
    if not (current_platform.is_cpu() or current_platform.is_cuda_alike()):
        raise ModelError(f"Modulation in vLLM runs on CPU and CUDA, not on {current_platform.device_name}.")
    if device not in ("auto", built_for):
        raise ModelError(
            f"Device {device!r} was asked for, but the installed vLLM was built for {built_for}."
        )
    return Resolved(built_for, "what the installed vLLM was built for" if device == "auto" else "as asked")


def engine_arguments(
    model: str,
    config: Any,
    sizes: Sizes,
    arguments: VllmArguments,
    adapters: Adapters,
    *,
    on_device: str,
    dtype: str,
    bounds_cache: bool,
    max_num_seqs: int,
    prefix_caching: bool,
    trust_remote_code: bool,
) -> AsyncEngineArgs:
    """The arguments for vLLM. `config` is the model's; `bounds_cache`: the KV cache has the size of `sizes`,
    otherwise vLLM takes what memory there is.

    Raises:
        ModelError: an argument that vLLM does not have, or that is the server's to set.
    """
    prepare_environment()
    given: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "max_num_seqs": max_num_seqs,
        "enable_prefix_caching": prefix_caching,
        "trust_remote_code": trust_remote_code,
        "load_format": "safetensors",  # nothing is unpickled
        "worker_cls": WORKER,
        "additional_config": _COMPILED_WITH,
        "structured_outputs_config": {"backend": "guidance"},
        "max_logprobs": -1,
        "disable_log_stats": True,
        "tensor_parallel_size": arguments.tensor_parallel_size,
        "pipeline_parallel_size": arguments.pipeline_parallel_size,
        "data_parallel_size": arguments.data_parallel_size,
        **adapters.arguments,
    }
    for name in ("distributed_executor_backend", "quantization", "gpu_memory_utilization"):
        if getattr(arguments, name) is not None:
            given[name] = getattr(arguments, name)
    if bounds_cache:
        given["max_model_len"] = int(sizes.max_model_len.value)
        given["kv_cache_memory_bytes"] = cache_bytes(config, sizes, arguments, dtype)
    elif sizes.max_model_len.reason == "as asked":
        given["max_model_len"] = int(sizes.max_model_len.value)
    if on_device == "cpu":
        # vLLM's own default on CPU is a share of all memory, which is refused where other programs run.
        given["max_num_batched_tokens"] = max(512, max_num_seqs)
    try:
        return AsyncEngineArgs(**given | _others(arguments.others))
    except (TypeError, ValueError) as error:
        raise ModelError(f"vLLM refuses its arguments: {str(error).partition(chr(10))[0]}") from error


def cache_bytes(config: Any, sizes: Sizes, arguments: VllmArguments, dtype: str) -> int:
    """Bytes of each rank's KV cache that hold the tokens of `sizes`, and one page that vLLM keeps empty."""
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    of_rank = -(-heads // arguments.tensor_parallel_size)
    layers = -(-int(config.num_hidden_layers) // arguments.pipeline_parallel_size)
    per_token = 2 * layers * of_rank * int(width) * torch.finfo(getattr(torch, dtype)).bits // 8
    return (sizes.cache_tokens + sizes.page_size) * per_token


def _others(texts: Sequence[str]) -> dict[str, Any]:
    known = {field.name for field in fields(AsyncEngineArgs)}
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        name = key.strip().removeprefix("--").replace("-", "_")
        if not equals or name not in known:
            raise ModelError(f"vllm_arg {text!r} is not KEY=VALUE with an engine argument of vLLM as KEY.")
        if name in _OURS | _HAVE_FLAGS:
            raise ModelError(f"vllm_arg {name} is set by the server itself, or by a flag of its own.")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
