"""vLLM's worker with modulation in it: what runs in each of vLLM's own processes, one a rank.

Knows vLLM's model runner and modules. Knows nothing of prompts, requests' levels by name or the server.

Each MLP's activation is wrapped: what it gives is multiplied by one factor per token and neuron, read from
dense tables (`modulation.tables`) of this rank's own neurons. Tables and the thresholds of the step's tokens
are tensors in static storage, so compiled code and CUDA graphs hold them, and a mask is put in force by
copying into them. There are several tables, by slot: a token names the slot of the mask that its request
began under. Slot `IDENTITY` stays as it was made: it multiplies by exactly 1.0.

Whatever could let a token pass unmodulated raises: another model runner, a layer without a known activation,
a request without a threshold, a step whose thresholds were not filled in.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from vllm.platforms import current_platform

from modulation.masks import Mask
from modulation.sites import find_paths
from modulation.tables import NEVER, LayerTable, layer_table

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

EXTRA_ARGS_KEY: Final = "neurontune"
"""Where `SamplingParams.extra_args` has a request's [num_safety, num_utility, slot]."""

IDENTITY: Final = 0
NUM_SLOTS: Final = 6

# The activation whose output goes into the projection, by the projection's path in a layer. Families that
# vLLM runs through transformers' own modules have others, and are refused.
_ACTIVATIONS: Final = {
    "mlp.down_proj": "mlp.act_fn",
    "mlp.c_proj": "mlp.act",
    "mlp.dense_4h_to_h": "mlp.act",
    "fc2": "activation_fn",
}


class VllmModulationError(RuntimeError):
    """Modulation cannot be put in force on this rank."""


class ModulatedActivation(nn.Module):
    """An activation whose output (tokens, neurons of this rank) is multiplied by the active factors.

    `thresholds` int32 (most tokens of a step, 3): num_safety, num_utility and slot of each of the step's
    tokens; one tensor for all layers. The tables are (slots, neurons of this rank).
    """

    codes: Tensor
    factors: Tensor
    thresholds: Tensor

    def __init__(self, activation: nn.Module, thresholds: Tensor, num_neurons: int) -> None:
        super().__init__()
        self.activation = activation
        shape, device = (NUM_SLOTS, num_neurons), thresholds.device
        self.register_buffer(
            "codes", torch.full(shape, NEVER, dtype=torch.int32, device=device), persistent=False
        )
        self.register_buffer("factors", torch.ones(shape, device=device), persistent=False)
        self.register_buffer("thresholds", thresholds, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        activations: Tensor = self.activation(inputs)
        thresholds = self.thresholds[: activations.shape[0]]
        safety, utility, slots = thresholds[:, 0:1], thresholds[:, 1:2], thresholds[:, 2]
        codes = self.codes.index_select(0, slots)
        active = (codes < safety) & (codes >= -utility)
        scale = torch.where(active, self.factors.index_select(0, slots), 1.0)
        return (activations * scale).to(activations.dtype)

    def fill(self, slot: int, table: LayerTable) -> None:
        """Put a table into a slot, in place."""
        self.codes[slot].copy_(torch.from_numpy(table.codes))
        self.factors[slot].copy_(torch.from_numpy(table.factors))


class NeuronTuneWorker(PlatformWorker):  # type: ignore[misc]
    """A worker whose model is modulated, under whatever `vllm_config` asks for beside it."""

    def init_device(self) -> None:
        super().init_device()
        config = self.vllm_config
        if self.use_v2_model_runner:
            raise VllmModulationError(
                "vLLM's model runner V2 is in use, which modulation is not written for. Unset "
                "VLLM_USE_V2_MODEL_RUNNER, and leave out engine arguments that need V2."
            )
        if config.parallel_config.use_ubatching:
            raise VllmModulationError(
                "Micro-batches (enable_dbo, ubatch_size) are not supported: a step's tokens must reach the "
                "layers in one piece."
            )
        runner = self.model_runner
        self._thresholds = torch.zeros((runner.max_num_tokens, 3), dtype=torch.int32, device=self.device)
        self._layers: list[tuple[int, int, int, ModulatedActivation]] = []  # layer, begin, end, module
        self._rows = _Rows(runner, self._thresholds)
        if current_platform.is_cpu():
            _UnfinishedPrompts(runner)

    def load_model(self, **keywords: Any) -> None:
        super().load_model(**keywords)
        model, config = self.model_runner.get_model(), self.model_config.hf_text_config
        _read_logits_without_adapters(model)
        self._layers = list(_modulated_layers(model, config, self._thresholds))

    def neurontune_describe(self) -> dict[str, Any]:
        """What this rank holds: its layers' indices, and which neurons of each."""
        return {
            "rank": self.rank,
            "layers": [(layer, begin, end) for layer, begin, end, _ in self._layers],
            "num_steps": self._rows.num_steps,
        }

    def neurontune_put_mask(self, slot: int, contents: bytes) -> int:
        """Put a mask, as the bytes of its file, into a slot that no running request uses. How many of its
        neurons this rank has put in force."""
        assert slot != IDENTITY, slot
        mask = Mask.from_bytes(contents)
        for layer, begin, end, module in self._layers:
            module.fill(slot, layer_table(mask, layer, begin, end))
        return sum(int((module.codes[slot] != NEVER).sum()) for *_, module in self._layers)

    def neurontune_put_trial(self, slot: int) -> None:
        """Put into a slot what tells ranks apart: the code of each neuron is its rank in the replica and its
        factor is zero, so that a threshold of n silences the first n ranks and no others."""
        assert slot != IDENTITY, slot
        parallel = self.parallel_config
        place = self.rank % (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)
        for _, begin, end, module in self._layers:
            width = end - begin
            module.fill(slot, LayerTable(np.full(width, place, np.int32), np.zeros(width, np.float32)))


class _Rows:
    """Fills in the thresholds of a step's tokens. Takes its place in the model runner's own methods."""

    def __init__(self, runner: Any, thresholds: Tensor) -> None:
        self._runner = runner
        self._thresholds = thresholds
        pinned = thresholds.is_cuda
        self._staged = torch.zeros(thresholds.shape, dtype=torch.int32, pin_memory=pinned)
        self._array = self._staged.numpy()
        self._is_filled = False
        self.num_steps = 0
        self._prepare_inputs = _replaced(runner, "_prepare_inputs", self.prepare_inputs)
        self._model_forward = _replaced(runner, "_model_forward", self.model_forward)

    def prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        """The runner's own, and the thresholds beside it: here the batch's rows are in the order that the
        step's tokens have, and the last step's copies out of staging are known to have ended."""
        self._fill(num_scheduled_tokens)
        return self._prepare_inputs(scheduler_output, num_scheduled_tokens)

    def model_forward(self, *arguments: Any, **keywords: Any) -> Any:
        """The runner's own, which every step goes through. Warm-up and capture call the model itself."""
        if not self._is_filled:
            raise VllmModulationError("The thresholds of this step's tokens are not known: it is not run.")
        self._is_filled = False
        self.num_steps += 1
        return self._model_forward(*arguments, **keywords)

    def _fill(self, num_scheduled_tokens: Any) -> None:
        """`num_scheduled_tokens` has the batch's requests in order."""
        names = self._runner.input_batch.req_ids
        thresholds = np.array([self._threshold(name) for name in names], np.int32)
        rows = np.repeat(thresholds, num_scheduled_tokens, axis=0)
        self._array[: len(rows)] = rows
        self._thresholds[: len(rows)].copy_(self._staged[: len(rows)], non_blocking=True)
        self._is_filled = True

    def _threshold(self, name: str) -> Any:
        found = (self._runner.requests[name].sampling_params.extra_args or {}).get(EXTRA_ARGS_KEY)
        if found is None:
            raise VllmModulationError(f"Request {name} has no threshold: it is not run.")
        return found


class _UnfinishedPrompts:
    """Keeps a seeded request's generator out of the steps that only read a part of its prompt.

    vLLM draws in these steps too, throws the draw away and turns the generator back; on CPU generators cannot
    be turned back, and vLLM 0.32 dies of it: one seeded request with a long prompt would end the server.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._held: dict[int, Any] = {}
        self._sample = _replaced(runner, "_sample", self.sample)
        self._bookkeeping_sync = _replaced(runner, "_bookkeeping_sync", self.bookkeeping_sync)

    def sample(self, *arguments: Any, **keywords: Any) -> Any:
        batch = self._runner.input_batch
        unfinished = np.nonzero(self._runner.discard_request_mask.np[: batch.num_reqs])[0]
        for row in map(int, unfinished):
            if row in batch.generators:
                self._held[row] = batch.generators.pop(row)
        return self._sample(*arguments, **keywords)

    def bookkeeping_sync(self, *arguments: Any, **keywords: Any) -> Any:
        kept = self._bookkeeping_sync(*arguments, **keywords)
        self._runner.input_batch.generators.update(self._held)
        self._held = {}
        return kept


def _replaced(runner: Any, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Put `method` into the place of one of the model runner's own, and give that one back."""
    own: Callable[..., Any] | None = getattr(runner, name, None)
    if own is None:
        raise VllmModulationError(f"This vLLM's model runner has no {name}: it is another version's.")
    setattr(runner, name, method)
    return own


def _read_logits_without_adapters(model: nn.Module) -> None:
    """Adapters of the output layer are not served, and vLLM 0.32 dies of log-probabilities of prompts where
    its logits go through them: it has places for the tokens that are sampled alone."""
    name = "logits_processor"
    reader: Any = getattr(model, name, None)
    if type(reader).__name__ == "LogitsProcessorWithLoRA":
        setattr(model, name, reader.base_layer)


def _modulated_layers(
    model: nn.Module, config: Any, thresholds: Tensor
) -> Iterator[tuple[int, int, int, ModulatedActivation]]:
    """Wrap the activations of this rank's layers: each one's index, its neurons' bounds and the wrapper."""
    layers_path, projection_path = find_paths(config)
    activation_path = _ACTIVATIONS[projection_path]
    for index, layer in enumerate(_layers(model, layers_path)):
        if type(layer).__name__ == "PPMissingLayer":  # another pipeline rank's
            continue
        try:
            projection, activation = (
                layer.get_submodule(projection_path),
                layer.get_submodule(activation_path),
            )
        except AttributeError as error:
            raise _other_modules(model, f"layer {index} has no such module ({error})") from error
        begin, end = _bounds(model, projection)
        wrapped = ModulatedActivation(activation, thresholds, end - begin)
        parent, _, name = activation_path.rpartition(".")
        setattr(layer.get_submodule(parent), name, wrapped)
        yield index, begin, end, wrapped


def _layers(model: nn.Module, path: str) -> list[nn.Module]:
    if type(model).__name__.startswith("Transformers"):
        raise _other_modules(model, "vLLM runs it through transformers' own modules")
    try:
        return list(model.get_submodule(path).children())
    except AttributeError as error:
        raise _other_modules(model, f"it has no layers at {path}") from error


def _bounds(model: nn.Module, projection: nn.Module) -> tuple[int, int]:
    """Which neurons, as global indices, this rank's part of a projection reads."""
    projection = getattr(projection, "base_layer", projection)  # beneath LoRA
    width = getattr(projection, "input_size_per_partition", None)
    rank = getattr(projection, "tp_rank", None)
    size = getattr(projection, "input_size", None)
    parts = getattr(projection, "tp_size", None)
    if width is None or rank is None or size is None or parts is None:
        raise _other_modules(model, f"its projection is a {type(projection).__name__}")
    if width * parts != size:
        raise _other_modules(model, f"its {size} neurons a layer are not split evenly in {parts}")
    return rank * width, (rank + 1) * width


def _other_modules(model: nn.Module, why: str) -> VllmModulationError:
    return VllmModulationError(
        f"vLLM's {type(model).__name__} cannot be modulated: {why}. Serve it with --engine transformers."
    )
