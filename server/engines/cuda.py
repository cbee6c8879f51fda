"""Steps on CUDA: what a step is told goes over in a few transfers, and steps that are alike are recorded once
as a graph and replayed. A step then costs the GPU's time, not that of launching each of its kernels.

Knows the manager's runner and its inputs, and of requests what makes steps alike. Masks are opaque.

A graph repeats what ran when it was recorded, hooks of modulation included, on whatever its static inputs
hold: thresholds, tokens, sampling. What is not in those inputs must be the same: the mask, which processors
run, and that nothing has to be done in Python between the model's logits and the tokens. Steps for which that
does not hold run as they are.
"""

from typing import Any, Final

import torch
from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import FutureRequestState
from transformers.generation.continuous_batching.utils import CudaGraphBuffer

from server.engines.sampling import RequestProcessors

# Larger steps read prompts, unless so many requests run: there the GPU is busy anyway, and sizes are many.
_MOST_TOKENS: Final = 256
_MOST_GRAPHS: Final = 128
# Of the keys that a step reads. Smaller ones pad less and need more graphs.
_KV_INTERVAL: Final = 4096


def batching_arguments(*, uses_graphs: bool) -> dict[str, Any]:
    """What the manager's configuration has to say of graphs."""
    return {"use_cuda_graph": uses_graphs} | (
        {"kv_padding_interval_size": _KV_INTERVAL} if uses_graphs else {}
    )


class CudaIOs(ContinuousBatchingIOs):
    """The inputs of steps: written on the host and brought to the GPU together; graphs are told apart by what
    runs after the model, too."""

    cache: Any  # as the manager has it
    processors: RequestProcessors
    host: ContinuousBatchingIOs | None  # None: they are written on the GPU, one by one

    @classmethod
    def take_over(
        cls, inputs: object, processors: RequestProcessors, config: ContinuousBatchingConfig
    ) -> None:
        """Make `inputs` one of these."""
        assert type(inputs) is ContinuousBatchingIOs, type(inputs)
        taken: Any = inputs
        taken.__class__ = cls
        taken.processors = processors
        taken.host = None
        if taken.attention_mask is None:  # a mask would be the most of it by far
            made = taken.cache, taken.config, config, torch.device("cpu"), taken.model_dtype, processors
            taken.host = ContinuousBatchingIOs(*made)

    def prepare_batch_tensors(
        self, requests_in_batch: list[FutureRequestState], *arguments: Any, **keywords: Any
    ) -> None:
        """As the base class does, all on the host first."""
        if self.host is None:
            super().prepare_batch_tensors(requests_in_batch, *arguments, **keywords)
            self._after_what_was_begun()
            return
        self.host.prepare_batch_tensors(requests_in_batch, *arguments, **keywords)
        stream = self._after_what_was_begun()
        self.host._transfer_inputs(self, stream, non_blocking=True)
        self.requests_in_batch = self.host.requests_in_batch
        self.req_id_to_new_token_position = self.host.req_id_to_new_token_position

    def _after_what_was_begun(self) -> torch.cuda.Stream:
        """The stream of steps, which goes on when what this thread has begun on its own is done."""
        stream = self.compute_stream
        assert stream is not None, "there is one on CUDA"
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        return stream

    def set_graph(self, graph: torch.cuda.CUDAGraph) -> None:
        """As the base class does; of too many the oldest goes."""
        super().set_graph(graph)
        kept = self.graphs._storage
        while len(kept) > _MOST_GRAPHS:
            kept.pop(next(iter(kept))).reset()

    def reset(self) -> None:
        """As the base class does, on both sides."""
        super().reset()
        if self.host is not None:
            self.host.reset()

    def _get_graph_key(self) -> tuple[int, ...]:
        return (*super()._get_graph_key(), *self.processors.running)


class CudaRunner(ModelRunner):
    """Runs steps on CUDA, and replays those that may be replayed, where the manager is to use graphs."""

    inputs_and_outputs: CudaIOs
    _mask: Any
    _most_tokens: int

    @classmethod
    def take_over(cls, runner: ModelRunner, processors: RequestProcessors) -> None:
        """Make `runner`, and the inputs that it has, one of these."""
        if type(runner) is cls:
            return
        assert type(runner) is ModelRunner, type(runner)
        config = runner.cb_config
        CudaIOs.take_over(runner.inputs_and_outputs, processors, config)
        taken: Any = runner
        taken.__class__ = cls
        taken._mask = None
        assert config.max_requests_per_batch is not None
        taken._most_tokens = max(_MOST_TOKENS, config.max_requests_per_batch + config.q_padding_interval_size)

    def forget_graphs(self) -> None:
        """None is kept. Must be called before the runner is given up: graphs share memory that it owns."""
        self.inputs_and_outputs.graphs = CudaGraphBuffer()

    def _get_forward_fn(self, use_block_table: bool) -> tuple[Any, bool]:
        forward, uses_graphs = super()._get_forward_fn(use_block_table)
        return forward, uses_graphs and self._may_be_replayed()

    def _may_be_replayed(self) -> bool:
        inputs = self.inputs_and_outputs
        mask, is_small = inputs.processors.only_mask, inputs.num_q_tokens <= self._most_tokens
        # A suspect is what a step has failed of: recording takes more memory than running.
        if mask is None or not is_small or inputs.cache.suspects or not inputs.processors.is_alike:
            return False
        if mask is not self._mask:  # graphs read its tensors, so it is kept as long as they are
            self.forget_graphs()
            self._mask = mask
        return True
