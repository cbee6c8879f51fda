"""One request's stay: its place, its time, and what its caller is charged.

Knows admission, rates and deadlines, and in which order they are asked. Knows no route and no engine but
its outputs.
"""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.admission import Admission, Seat
from server.audit import entry_of
from server.callers import Caller, caller_of
from server.deadlines import seconds_of, within
from server.engines.base import Output
from server.errors import RefusedError
from server.metrics import Metrics
from server.rates import Rates

SCOPE_KEY: Final = "neurontune.visit"


class Visit:
    """What a request holds and has used so far."""

    def __init__(self, gate: "Gate", seat: Seat, caller: Caller) -> None:
        self._gate = gate
        self._seat = seat
        self._caller = caller
        self._num_charged = 0
        self._num_used = 0

    async def take(self, num_tokens: Sequence[int], num_choices: int) -> None:
        """Hold a place for each answer, and charge about the tokens of its prompt, once for `num_choices`.

        Raises:
            OverloadedError, RateLimitError: not now.
            InvalidValueError: never: more answers than there are places, or more tokens than the rate.
        """
        num_charged = sum(num_tokens[::num_choices])
        with self._gate.counting_rejections():
            self._seat.take(num_tokens)
            await self._gate.rates.charge_prompt(self._caller, num_charged)
        self._num_charged = num_charged

    async def counted(
        self, outputs: AsyncGenerator[Output, None], num_tokens: int, *, is_charged_prompt: bool
    ) -> AsyncGenerator[Output, None]:
        """`outputs`, whose first one ends the waiting of the prompt's `num_tokens`. Closing closes them."""
        last: Output | None = None
        async with aclosing(outputs):
            try:
                async for output in outputs:
                    if last is None:
                        self._seat.begun(num_tokens)
                    last = output
                    yield output
            finally:
                if last is not None:
                    self._num_used += last.num_completion_tokens
                    self._num_used += last.num_prompt_tokens if is_charged_prompt else 0

    async def settle(self) -> None:
        """Charge what was used beyond what was charged."""
        await self._gate.rates.charge_rest(self._caller, self._num_used - self._num_charged)


@dataclass(frozen=True)
class Gate:
    """What every request passes that generates or tokenises. `max_seconds` bounds its time."""

    admission: Admission
    rates: Rates
    metrics: Metrics
    max_seconds: float

    async def answer(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Let `app` answer with a `Visit` in its scope, if there is a place for it, within its time.

        Raises:
            OverloadedError, RateLimitError: there is none now.
            DeadlineExceededError: the time was over before the answer began.
            InvalidValueError: the time asked for is none.
        """
        seconds, caller = seconds_of(scope, self.max_seconds), caller_of(scope)

        async def work(send: Send) -> None:
            with ExitStack() as held:
                with self.counting_rejections():
                    seat = held.enter_context(self.admission.seat())
                    await self.rates.admit(caller)
                visit = scope[SCOPE_KEY] = Visit(self, seat, caller)
                try:
                    await app(scope, receive, self._with_rates(caller, send))
                finally:
                    await visit.settle()

        def expired(error: Exception) -> None:
            self.metrics.deadline_exceeded()
            entry_of(scope).failed(error)

        await within(seconds, send, work, on_expiry=expired)

    @contextmanager
    def counting_rejections(self) -> Iterator[None]:
        """Count what the block refuses. To be used inside the route, whose errors leave it as answers."""
        try:
            yield
        except RefusedError as error:
            self.metrics.rejected(error)
            raise

    def _with_rates(self, caller: Caller, send: Send) -> Send:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(await self.rates.headers(caller))
            await send(message)

        return sending


def visit_of(scope: Scope) -> Visit:
    """The visit of a request that has passed the gate."""
    visit = scope[SCOPE_KEY]
    assert isinstance(visit, Visit), visit
    return visit
