"""Which mask each token runs under: the one in force, or the one that its request began with.

Knows masks, modulators and the requests of a step. Knows nothing of prompts, outputs or the batching
manager. Hooks are put on and taken off between steps alone, on the thread that runs the model.

Two modulators can be on the model at once: a token of a request under another mask gets threshold (0, 0)
in this one, which multiplies by exactly 1.0. While one mask is in use, nothing is computed for a second.
"""

import asyncio
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modulation.masks import Mask
from modulation.modulator import Modulator
from server.engines.in_force import InForce, Known
from server.engines.threads import on_one_core


class RequestMask:
    """A mask laid out for the model, as a request of a step carries it."""

    def __init__(self, model: PreTrainedModel, mask: Mask, fingerprint: str | None = None) -> None:
        self.mask = mask
        self.modulator = Modulator(model, mask, fingerprint)
        if model.device.type == "cuda":
            # Steps run on a stream of their own. It may be recording, so the device must not be waited for.
            torch.cuda.current_stream(model.device).synchronize()

    def __deepcopy__(self, _memo: dict[int, Any]) -> Self:
        return self  # an evicted request starts over as another object, under the same mask


class Masks:
    """The masks that requests run under. Enter `with` it; leaving takes every hook off. `fingerprint` is that
    of the model's weights; None: they are in `model` itself.

    Raises, from the constructor:
        MaskError: the mask was made for another model.
    """

    def __init__(self, model: PreTrainedModel, mask: Mask, fingerprint: str | None = None) -> None:
        self._model = model
        self._fingerprint = fingerprint
        self._in_force = InForce(mask.digest, RequestMask(model, mask, fingerprint))
        self._swapping = asyncio.Lock()
        self._hooked: dict[RequestMask, ExitStack] = {}

    def __enter__(self) -> Self:
        self._hook([self._in_force.current.value])
        return self

    def __exit__(self, *_: object) -> None:
        self._hook([])

    @property
    def current(self) -> Known[RequestMask]:
        """The mask in force, and its number."""
        return self._in_force.current

    @property
    def modules(self) -> list[nn.Module]:
        """The modules that the masks in use change the inputs of, each once."""
        return list(dict.fromkeys(each for mask in self._hooked for each in mask.modulator.modules))

    async def use(self, mask: Mask) -> None:
        """Put `mask` in force for the requests that come; those that run go on under theirs.

        Raises:
            MaskError: the mask was made for another model. Nothing has changed.
        """
        async with self._swapping:
            if self._in_force.find(mask.digest) is None:
                made = await asyncio.to_thread(self._made, mask)
                self._in_force.put(mask.digest, made)
            else:
                self._in_force.put_back(mask.digest)

    def _made(self, mask: Mask) -> RequestMask:
        with on_one_core():
            return RequestMask(self._model, mask, self._fingerprint)

    def held(self, digest: str | None) -> AbstractContextManager[Known[RequestMask]]:
        """The mask of this digest, or the one in force, for a request to run under within the block.

        Raises:
            EngineUnavailableError: it is not known any more.
        """
        return self._in_force.held(digest)

    def before_step(
        self, thresholds: Tensor, owner: Tensor | None, masks: Sequence[RequestMask | None]
    ) -> None:
        """Put the masks of a step in force for it. On the thread that runs the model.

        `thresholds` int (requests, 2) and `masks` say what each request runs at and under (None: at (0, 0),
        so under any), `owner` int (tokens,) whose each token is (None: each request has one). `thresholds`
        may go on after the requests: a token there is padding.
        """
        per_token = thresholds if owner is None else thresholds[owner]  # (tokens, 2)
        used = list(dict.fromkeys(each for each in masks if each is not None)) or [self.current.value]
        self._hook(used)
        if len(used) == 1:
            used[0].modulator.set_thresholds(per_token)
            return
        for each in used:
            under = [mask is each for mask in masks] + [False] * (len(thresholds) - len(masks))
            belongs = torch.tensor(under, device=thresholds.device)
            belongs = belongs if owner is None else belongs[owner]
            each.modulator.set_thresholds(per_token * belongs[:, None])

    def check(self) -> None:
        """After a forward pass: raise ModulationError if it went past a site. On the thread that runs the
        model."""
        for each in self._hooked:
            each.modulator.check()

    def forget_step(self) -> None:
        """The last step did not end; the next one starts afresh. On the thread that runs the model."""
        self._hook([])

    def _hook(self, used: Sequence[RequestMask]) -> None:
        for each in [each for each in self._hooked if each not in used]:
            self._hooked.pop(each).close()
        for each in used:
            if each not in self._hooked:
                with ExitStack() as stack:
                    stack.enter_context(each.modulator)
                    self._hooked[each] = stack.pop_all()
