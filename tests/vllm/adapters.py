"""A plain vLLM server with an adapter for each of the demo model's levels, as docs/export.md has it.

A process of its own that knows nothing of this project.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from modulation.demo import MODEL_DIR
from server.process import bind
from tests.export.exporting import LEVELS, exported

MODELS = ("demo", *(f"demo-{level}" for level in LEVELS), "padded-balanced")
START_SECONDS = 300


@contextmanager
def serving_adapters(folder: Path) -> Iterator[str]:
    """The server's address; `folder` takes the adapters and the log."""
    exported("lora", "--out", folder)
    exported("lora", "--out", folder, "--padded", "--level", "balanced", "--name", "padded")
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL_DIR)),
        *("--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
        *("--enforce-eager", "--max-num-seqs", "32", "--kv-cache-memory-bytes", str(2**28)),
        # As long as the context: on CPUs vLLM 0.32 dies of a seeded request whose prompt takes several steps.
        *("--max-num-batched-tokens", "2048", "--enable-prompt-tokens-details"),
        *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--enable-lora", "--max-lora-rank", "32", "--max-loras", "5"),
        *("--lora-modules", *(f"{name}={folder / name}" for name in MODELS if name != "demo")),
    ]
    environment = {**os.environ, "VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = folder / "vllm.log"
    with log.open("wb") as written:
        process = subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        asyncio.run(_started(process, url, log))
        yield url
        try:
            assert httpx.get(f"{url}/health").status_code == 200
        except (AssertionError, httpx.TransportError) as error:
            error.add_note(f"vLLM has died:\n{log.read_text()[-8000:]}")
            raise
    finally:
        process.terminate()
        process.wait(60)


async def _started(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    async with httpx.AsyncClient() as client:
        for _ in range(START_SECONDS):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                if (await client.get(f"{url}/health")).status_code == 200:
                    return
            except httpx.TransportError:
                await asyncio.sleep(1)
    raise AssertionError(log.read_text()[-3000:])
