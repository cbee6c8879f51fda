"""What happens around each forward pass of a step: thresholds before it, the logits of prompts after it, and
in some steps how long modulation takes.

Knows the arguments that the manager passes to the model. Knows nothing of requests beyond their rows and
masks.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modulation.errors import ModelError
from modulation.sites import find_sites
from server.engines.batching import LevelManager
from server.engines.masks import Masks
from server.engines.rows import Row
from server.engines.sampling import NUM_THRESHOLD_ROWS
from server.engines.tallying import Tally
from server.engines.timing import Stopwatch


@contextmanager
def hooked(
    model: PreTrainedModel, masks: Masks, manager: Callable[[], LevelManager], tally: Tally
) -> Iterator[None]:
    """Within the block, the model's passes are steps of the manager, modulated by `masks`. `tally` is told
    how long that takes in the steps that it samples.

    `manager` is asked at each step: managers come and go.
    """
    steps = _Steps(model.device, masks, manager, tally)
    with ExitStack() as stack:
        stack.callback(steps.stop_timing)
        stack.callback(model.register_forward_pre_hook(steps.before, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(steps.after).remove)
        yield


@contextmanager
def passing_all_sites(model: PreTrainedModel) -> Iterator[None]:
    """Within the block there are forward passes, and each site of the model is called in them: also those
    that only another mask than the one in force has neurons of.

    Raises, at the end:
        ModelError: a site was not called.
    """
    unseen = {site.name for site in find_sites(model)}
    with ExitStack() as hooks:
        for site in find_sites(model):

            def saw(_module: nn.Module, _arguments: Any, name: str = site.name) -> None:
                unseen.discard(name)

            hooks.callback(site.module.register_forward_pre_hook(saw).remove)
        yield
    if unseen:
        raise ModelError(
            f"The model {type(model).__name__} does not go through {min(unseen)} and {len(unseen) - 1} more "
            "sites: its code bypasses the hooks, so it cannot be modulated there."
        )


class _Steps:
    def __init__(
        self, device: torch.device, masks: Masks, manager: Callable[[], LevelManager], tally: Tally
    ) -> None:
        self._device = device
        self._tally = tally
        self._timing = ExitStack()
        self._timed: Stopwatch | None = None  # in the step that runs
        self._untold: Stopwatch | None = None  # in one that has ended
        self._masks = masks
        self._manager = manager
        # As the processors have it, with the tokens as a tensor.
        self._scored: list[tuple[Row, int, Tensor]] = []

    def before(self, _model: nn.Module, args: Any, step: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Before each step: one threshold per token, from one per request."""
        per_request: Tensor = step["logits_processor_args"][:NUM_THRESHOLD_ROWS].T  # (requests, 2)
        ends: Tensor = step["cu_seq_lens_q"][1:]  # (requests,)
        num_tokens = step["input_ids"].shape[-1]
        if num_tokens == len(self._manager().processors.step) and not self._manager().pads_steps:
            owner = None  # each request has one token
        else:
            tokens = torch.arange(num_tokens, dtype=ends.dtype, device=ends.device)
            # A padding token lies beyond the last end; it takes the last request's threshold.
            owner = torch.searchsorted(ends, tokens, right=True).clamp_(max=len(ends) - 1)
        self._modulate(per_request, owner)
        self._scored = [
            (row, place, torch.arange(tokens.start, tokens.stop, dtype=ends.dtype, device=ends.device))
            for row, place, tokens in self._manager().processors.scored
        ]
        if not self._scored or "logits_to_keep" not in step:
            return None
        kept = torch.cat([step["logits_indices"], *(tokens for _, _, tokens in self._scored)])
        return args, step | {"logits_to_keep": kept}

    def _modulate(self, per_request: Tensor, owner: Tensor | None) -> None:
        self.stop_timing()  # that of a step that did not end
        self._tell()
        processors = self._manager().processors
        masks = processors.masks()
        if not processors.is_timed:
            self._masks.before_step(per_request, owner, masks)
            return
        self._timed = Stopwatch(self._device)
        self._timed.start()
        self._masks.before_step(per_request, owner, masks)
        self._timed.stop()
        self._timing.enter_context(self._timed.around_hooks(self._masks.modules))

    def stop_timing(self) -> None:
        """Take the marks off the model, and forget what they have measured."""
        self._timing.close()
        self._timed = None

    def _tell(self) -> None:
        if self._untold is not None and self._untold.is_known:
            self._tally.modulated(self._untold.seconds)
            self._untold = None

    def after(self, _model: nn.Module, _args: Any, output: Any) -> None:
        """After each step: hand the logits of prompts to their rows, and leave the manager its own.

        Raises:
            ModulationError: the pass went past a site. A CUDA graph of it must not be kept.
        """
        self._masks.check()
        if self._timed is not None:
            self._untold = self._timed
            self.stop_timing()
            self._tell()
        if not self._scored:
            return
        logits: Tensor = output.logits
        num_scored = sum(len(tokens) for _, _, tokens in self._scored)
        if self._manager().keeps_logits:
            scored = logits[0, -num_scored:]
            output.logits = logits[:, :-num_scored]
        else:
            scored = logits[0, torch.cat([tokens for _, _, tokens in self._scored])]
        for row, place, tokens in self._scored:
            row.saw_prompt(place, scored[: len(tokens)].float())
            scored = scored[len(tokens) :]
