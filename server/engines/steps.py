"""What happens around each forward pass of a step: thresholds before it, the logits of prompts after it.

Knows the arguments that the manager passes to the model. Knows nothing of requests beyond their rows and
masks.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.engines.batching import LevelManager
from server.engines.masks import Masks
from server.engines.rows import Row
from server.engines.sampling import NUM_THRESHOLD_ROWS, row_of


@contextmanager
def hooked(model: PreTrainedModel, masks: Masks, manager: Callable[[], LevelManager]) -> Iterator[None]:
    """Within the block, the model's passes are steps of the manager, modulated by `masks`.

    `manager` is asked at each step: managers come and go.
    """
    steps = _Steps(masks, manager)
    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(steps.before, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(steps.after).remove)
        yield


class _Steps:
    def __init__(self, masks: Masks, manager: Callable[[], LevelManager]) -> None:
        self._masks = masks
        self._manager = manager
        # Of the step that runs: whose prompt's logits are wanted, from which place on, of which tokens.
        self._scored: list[tuple[Row, int, Tensor]] = []

    def before(self, _model: nn.Module, args: Any, step: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Before each step: one threshold per token, from one per request."""
        per_request: Tensor = step["logits_processor_args"][:NUM_THRESHOLD_ROWS].T  # (requests, 2)
        ends: Tensor = step["cu_seq_lens_q"][1:]  # (requests,)
        num_tokens = step["input_ids"].shape[-1]
        tokens = torch.arange(num_tokens, dtype=ends.dtype, device=ends.device)
        # A padding token lies beyond the last end; it takes the last request's threshold.
        owner = torch.searchsorted(ends, tokens, right=True).clamp_(max=len(ends) - 1)
        self._masks.before_step(per_request, owner, self._manager().processors.masks())
        self._scored = self._prompts_to_score(ends)
        if not self._scored or "logits_to_keep" not in step:
            return None
        kept = torch.cat([step["logits_indices"], *(tokens for _, _, tokens in self._scored)])
        return args, step | {"logits_to_keep": kept}

    def _prompts_to_score(self, ends: Tensor) -> list[tuple[Row, int, Tensor]]:
        """Of requests that want their prompt's log-probabilities: the row, the place in the prompt that its
        first token of this step predicts, and its tokens of this step that predict one of the prompt."""
        processors = self._manager().processors
        scored = []
        for number, (request, begin) in enumerate(zip(processors.step, processors.begins(), strict=True)):
            row = row_of(request)
            if row.num_prompt_logprobs is None:
                continue
            first = int(ends[number]) - request.query_length
            count = min(request.query_length, len(row.prompt) - 1 - begin)
            if count > 0:
                tokens = torch.arange(first, first + count, dtype=ends.dtype, device=ends.device)
                scored.append((row, begin + 1, tokens))
        return scored

    def after(self, _model: nn.Module, _args: Any, output: Any) -> None:
        """After each step: hand the logits of prompts to their rows, and leave the manager its own."""
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
