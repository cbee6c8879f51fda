"""The command `neurontune`: reads settings, builds the engine, runs the server.

Knows commands, exit codes and how to say what went wrong in one sentence. Imports what is heavy only in
the command that needs it.
"""

import asyncio
import inspect
import logging
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperGroup

from modulation.attribution.commands import attribute
from modulation.demo import MASK_FILE, MODEL_DIR
from modulation.errors import NeuronTuneError
from modulation.evaluation.commands import evaluate
from modulation.evaluation.prompts_command import prompts
from modulation.evaluation.robustness_commands import robustness
from modulation.export.commands import app as export
from modulation.tuning.commands import tune
from modulation.tuning.level_commands import levels
from server.errors import SettingsError
from server.key_commands import app as keys
from server.settings import DEMO, Settings, flag, read_key, read_settings, variable

if TYPE_CHECKING:
    from server.engines.base import Engine


class _OneSentence(TyperGroup):
    """Any error of ours, from any command: its text on stderr, exit code 1, a traceback only in debug."""

    def invoke(self, ctx: Any) -> Any:  # typer's own context class differs between its versions
        try:
            return super().invoke(ctx)
        except NeuronTuneError as error:
            logging.getLogger(__name__).debug("The error's origin:", exc_info=True)
            typer.echo(f"neurontune: {error}", err=True)
            raise typer.Exit(1) from error


class _Demo(TyperGroup):
    """`neurontune demo`, imported when it is used: what trains a model takes seconds to import."""

    def list_commands(self, ctx: Any) -> list[str]:
        return self._imported().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self._imported().get_command(ctx, cmd_name)

    def _imported(self) -> TyperGroup:
        from modulation.demo.commands import app as commands

        group = typer.main.get_command(commands)
        assert isinstance(group, TyperGroup), group
        return group


app = typer.Typer(
    name="neurontune",
    cls=_OneSentence,
    help="Serve a language model whose safety level each request chooses.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(
    typer.Typer(
        name="demo",
        cls=_Demo,
        help="The demo model: train it, print its prompts, evaluate it.",
        no_args_is_help=True,
    )
)
app.add_typer(keys)
app.add_typer(export)


def serve(**flags: Any) -> None:
    """Serve the model over OpenAI's API."""
    settings = read_settings({name: value for name, value in flags.items() if value not in (None, [])})
    logging.basicConfig(level=settings.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    from server.process import ended_by_signals

    with ended_by_signals() as end_if_signalled:
        _serve(settings, end_if_signalled)


def _serve(settings: Settings, end_if_signalled: Callable[[], None]) -> None:
    from server.app import create_app, reload
    from server.connections import Limits, allow_files
    from server.draining import Drain
    from server.process import EngineEnd, bind, run

    end = EngineEnd()
    allow_files(settings.max_connections)
    with bind(settings.host, settings.port) as listener:
        engine = build_engine(settings, end, end_if_signalled)
        try:
            end_if_signalled()
            drain = Drain()
            application = create_app(settings, engine, drain)
            address, port = listener.getsockname()[:2]
            welcome = _welcome(settings, engine, address, port)
            end_if_signalled()  # uvicorn has handlers of its own soon; until then the engine is not closed
        except BaseException:
            asyncio.run(engine.close())
            raise
        run(
            application,
            engine,
            listener,
            settings.log_level,
            welcome,
            drain,
            end,
            lambda: reload(application),
            grace_seconds=settings.grace_seconds,
            limits=Limits(
                settings.max_connections,
                settings.read_timeout_seconds,
                settings.request_timeout_seconds,
                settings.keep_alive_seconds,
            ),
            on_refused=application.state.metrics.rejected,
        )


def build_engine(
    settings: Settings,
    on_fatal: Callable[[str], None] | None = None,
    before_loading: Callable[[], None] = lambda: None,
) -> "Engine":
    """The engine that `settings` ask for, ready to generate. `on_fatal` is called when it has given up, and
    `before_loading` where nothing but modules has been loaded.

    Raises:
        NeuronTuneError: the model, the mask, or the two together cannot be served.
    """
    if settings.engine == "fake":
        from server.engines.fake import FakeEngine

        return FakeEngine(
            settings.served_model_name,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
        )
    if settings.engine == "upstream":
        return _gateway(settings)
    from server.engines.supervision import leave_it

    if settings.trust_remote_code:
        logging.getLogger(__name__).warning(
            "trust_remote_code is on: Python code of the model %r runs with this server's rights.",
            settings.model,
        )
    model, mask = str(MODEL_DIR) if settings.model == DEMO else settings.model, settings.mask or MASK_FILE
    common: dict[str, Any] = {
        "served_model_name": settings.served_model_name,
        "device": settings.device,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "kv_cache_tokens": settings.kv_cache_tokens,
        "max_num_seqs": settings.max_num_seqs,
        "prefix_caching": settings.prefix_caching,
        "trust_remote_code": settings.trust_remote_code,
        "allow_less_safe_levels": settings.allow_less_safe_levels,
        "on_fatal": on_fatal or leave_it,
    }
    if settings.engine == "vllm":
        return _vllm_engine(settings, model, mask, common, before_loading)
    from server.engines.transformers import TransformersEngine

    before_loading()
    return TransformersEngine(
        model,
        mask,
        cuda_graphs=settings.cuda_graphs,
        compile_model=settings.compile,
        max_failures=settings.max_engine_failures,
        **common,
    )


def _vllm_engine(
    settings: Settings, model: str, mask: Path, common: dict[str, Any], before_loading: Callable[[], None]
) -> "Engine":
    if find_spec("vllm") is None:
        raise SettingsError(
            "The engine 'vllm' needs vLLM, which is not installed: pip install 'neurontune[vllm]' for GPUs, "
            "make vllm-env for a CPU (docs/scaling.md)."
        )
    from server.engines.vllm import VllmEngine
    from server.engines.vllm_arguments import VllmArguments

    before_loading()
    arguments = VllmArguments(
        tensor_parallel_size=settings.tensor_parallel_size,
        pipeline_parallel_size=settings.pipeline_parallel_size,
        data_parallel_size=settings.data_parallel_size,
        distributed_executor_backend=settings.distributed_executor_backend,
        quantization=settings.quantization,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        lora=settings.lora,
        others=settings.vllm_arg,
    )
    return VllmEngine(model, mask, arguments=arguments, **common)


def _gateway(settings: Settings) -> "Engine":
    """The engine in front of another server."""
    from server.engines.upstream import UpstreamEngine

    assert settings.upstream is not None and settings.mask is not None
    return UpstreamEngine(
        settings.upstream.rstrip("/").removesuffix("/v1"),
        settings.mask,
        served_model_name=settings.served_model_name,
        upstream_model=settings.upstream_model or settings.served_model_name,
        key=None if settings.upstream_key_file is None else read_key(settings.upstream_key_file),
        adapters=dict(each.split("=", 1) for each in settings.adapter),
        max_model_len=settings.max_model_len,
        timeout_seconds=settings.upstream_timeout_seconds,
        allow_less_safe_levels=settings.allow_less_safe_levels,
    )


def _welcome(settings: Settings, engine: "Engine", address: str, port: int) -> str:
    """What is served, as it was resolved, and a request to try it with."""
    info = engine.describe()
    levels = ", ".join(
        f"{level.name} ({level.threshold.num_safety}, {level.threshold.num_utility})" for level in info.levels
    )
    host = "localhost" if address in ("0.0.0.0", "::") else f"[{address}]" if ":" in address else address
    key = "" if settings.keys is None else " -H 'Authorization: Bearer KEY'"
    message = '{"role": "user", "content": "How do I kill weeds?"}'
    lines = [
        f"model           {info.model_id}",
        *(f"{name:<15} {value}" for name, value in info.details.items()),
        f"mask            {info.mask_digest}",
        f"levels          {levels}; default {settings.default_level}",
        f"address         http://{host}:{port}",
        "",
        "Try it:",
        f"  curl -s http://{host}:{port}/v1/chat/completions{key} -H 'X-Safety-Level: security-critical' \\",
        f'    -d \'{{"model": "{settings.served_model_name}", "temperature": 0, "messages": [{message}]}}\'',
    ]
    return "\n".join(lines)


def _parameter(name: str) -> inspect.Parameter:
    """The command-line option of one setting: a string that `Settings` reads, or a switch."""
    field = Settings.model_fields[name]
    switch = field.annotation is bool
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    default = "" if field.default in (None, "", ()) else f" Default: {field.default}."
    option = typer.Option(
        f"{flag(name)}/--no-{flag(name)[2:]}" if switch else flag(name),
        help=f"{field.description}{default} ({variable(name)})",
        metavar=None if switch else "|".join(choices) or "VALUE",
        show_default=False,
    )
    several = get_origin(field.annotation) is tuple
    kind = bool | None if switch else list[str] | None if several else str | None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
    )


serve.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [_parameter(name) for name in Settings.model_fields]
)
app.command()(serve)
app.command()(evaluate)
app.command()(prompts)
app.command()(attribute)
app.command()(tune)
app.command()(levels)
app.command()(robustness)


@app.command("inspect")
def inspect_mask(file: Annotated[Path, typer.Argument(help="A mask file (.safetensors).")]) -> None:
    """Print what is in a mask file."""
    from modulation.masks import Mask, describe

    typer.echo(describe(Mask.load(file)))


@app.command()
def version() -> None:
    """Print the version."""
    try:
        number = installed_version("neurontune")
    except PackageNotFoundError:
        number = "(not installed; run from a source tree)"
    typer.echo(f"neurontune {number}, Python {sys.version.split()[0]}")
