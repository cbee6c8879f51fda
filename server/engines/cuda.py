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

# Larger steps read prompts: there the GPU is busy anyway, and their sizes are many.
_MOST_TOKENS: Final = 256
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

    processors: RequestProcessors
    host: ContinuousBatchingIOs | None  # None: they are written on the GPU, one by one

    @classmethod
    def take_over(cls, inputs: Any, processors: RequestProcessors, config: ContinuousBatchingConfig) -> None:
        """Make `inputs` one of these."""
        assert type(inputs) in (ContinuousBatchingIOs, CudaIOs), type(inputs)
        inputs.__class__ = cls
        inputs.processors = processors
        inputs.host = None
        if inputs.attention_mask is None:  # a mask would be the most of it by far
            made = inputs.cache, inputs.config, config, torch.device("cpu"), inputs.model_dtype, processors
            inputs.host = ContinuousBatchingIOs(*made)

    def prepare_batch_tensors(
        self, requests_in_batch: list[FutureRequestState], *arguments: Any, **keywords: Any
    ) -> None:
        """As the base class does, all on the host first."""
        if self.host is None:
            super().prepare_batch_tensors(requests_in_batch, *arguments, **keywords)
            return
        self.host.prepare_batch_tensors(requests_in_batch, *arguments, **keywords)
        self.host._transfer_inputs(self, self.compute_stream, non_blocking=True)  # type: ignore[arg-type]
        self.requests_in_batch = self.host.requests_in_batch
        self.req_id_to_new_token_position = self.host.req_id_to_new_token_position

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

    @classmethod
    def take_over(cls, runner: ModelRunner, processors: RequestProcessors) -> None:
        """Make `runner`, and the inputs that it has, one of these."""
        CudaIOs.take_over(runner.inputs_and_outputs, processors, runner.cb_config)
        taken: Any = runner
        taken.__class__ = cls
        taken._mask = None

    def forget_graphs(self) -> None:
        """None is kept. Must be called before the runner is given up: graphs share memory that it owns."""
        self.inputs_and_outputs.graphs = CudaGraphBuffer()

    def compute_batch(self, model: torch.nn.Module, batch_data: dict[str, Any]) -> None:
        """As the base class does, once the inputs are there, which may be written on another stream."""
        stream = self.inputs_and_outputs.compute_stream
        assert stream is not None, "there is one on CUDA"
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        super().compute_batch(model, batch_data)

    def _get_forward_fn(self, use_block_table: bool) -> tuple[Any, bool]:
        forward, uses_graphs = super()._get_forward_fn(use_block_table)
        return forward, uses_graphs and self._may_be_replayed()

    def _may_be_replayed(self) -> bool:
        inputs = self.inputs_and_outputs
        mask = inputs.processors.only_mask
        if mask is None or inputs.num_q_tokens > _MOST_TOKENS or not inputs.processors.is_alike:
            return False
        if mask is not self._mask:  # graphs read its tensors, so it is kept as long as they are
            self.forget_graphs()
            self._mask = mask
        return True
