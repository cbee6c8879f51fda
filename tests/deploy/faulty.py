"""`neurontune` as it is, but one step of its engine fails when the process gets SIGUSR1."""

import signal
import threading
from typing import Any

from server import cli
from server.engines.transformers import TransformersEngine


def main() -> None:
    """Run the command that the arguments say."""
    build, fails = cli.build_engine, threading.Event()

    def step(*_: object) -> None:
        if fails.is_set():
            fails.clear()
            raise RuntimeError("a step that was told to fail")

    def build_engine(*given: Any) -> TransformersEngine:
        engine = build(*given)
        assert isinstance(engine, TransformersEngine)
        engine._model.register_forward_pre_hook(step)
        return engine

    cli.build_engine = build_engine
    signal.signal(signal.SIGUSR1, lambda *_: fails.set())
    cli.app()


if __name__ == "__main__":
    main()
