"""Which steps are replayed, and when graphs go: without a GPU, on stand-ins of what is around it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching.utils import CudaGraphBuffer

from modulation.demo import MASK_FILE, MODEL_DIR
from server.engines.batching import is_out_of_memory
from server.engines.cuda import CudaIOs, CudaRunner, batching_arguments
from server.engines.transformers import TransformersEngine
from server.engines.varlen import can_attend_varlen, why_not_varlen
from tests.tiny_models import tiny_model


class Graph:
    def __init__(self) -> None:
        self.is_reset = False

    def reset(self) -> None:
        self.is_reset = True


@pytest.fixture
def runner() -> Any:
    """A runner whose next step is one of 64 tokens under one mask."""
    inputs: Any = object.__new__(CudaIOs)
    inputs.processors = SimpleNamespace(only_mask="mask", is_alike=True, running=[False, True])
    inputs.cache = SimpleNamespace(suspects=set())
    inputs.graphs = CudaGraphBuffer()
    inputs.num_q_tokens, inputs.max_kv_read, inputs.max_length_k = 64, 4096, {"full_attention": 1024}
    inputs.use_block_table = False
    made: Any = object.__new__(CudaRunner)
    made.inputs_and_outputs, made._mask, made._most_tokens = inputs, None, 256
    return made


def test_alike_steps_of_one_mask_are_replayed(runner: Any) -> None:
    assert runner._may_be_replayed()


@pytest.mark.parametrize(
    ("of", "name", "value"),
    [
        ("processors", "only_mask", None),
        ("processors", "is_alike", False),
        ("cache", "suspects", {"request-1"}),
        (None, "num_q_tokens", 320),
    ],
)
def test_other_steps_run_as_they_are(runner: Any, of: str | None, name: str, value: Any) -> None:
    inputs = runner.inputs_and_outputs
    setattr(inputs if of is None else getattr(inputs, of), name, value)
    assert not runner._may_be_replayed()


def test_graphs_of_another_mask_are_given_up_and_those_of_the_same_kept(runner: Any) -> None:
    inputs, graph = runner.inputs_and_outputs, Graph()
    assert runner._may_be_replayed()
    inputs.set_graph(graph)
    inputs.processors.only_mask = None  # a step of two masks between
    assert not runner._may_be_replayed()
    inputs.processors.only_mask = "mask"
    assert runner._may_be_replayed() and inputs.get_graph() is graph and not graph.is_reset
    inputs.processors.only_mask = "another"
    assert runner._may_be_replayed() and inputs.get_graph() is None and graph.is_reset


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_q_tokens", 128), ("max_kv_read", 8192), ("max_length_k", {"full_attention": 2048})],
)
def test_a_graph_is_found_for_steps_of_its_size_and_processors_alone(
    runner: Any, name: str, value: Any
) -> None:
    inputs, graph = runner.inputs_and_outputs, Graph()
    inputs.set_graph(graph)
    inputs.processors.running = [True, True]
    assert inputs.get_graph() is None
    inputs.processors.running = [False, True]
    assert inputs.get_graph() is graph
    setattr(inputs, name, value)
    assert inputs.get_graph() is None


def test_of_too_many_graphs_the_oldest_goes(runner: Any) -> None:
    inputs, graphs = runner.inputs_and_outputs, [Graph() for _ in range(130)]
    for number, graph in enumerate(graphs):
        inputs.max_kv_read = number
        inputs.set_graph(graph)
    assert [each.is_reset for each in graphs] == [True] * 2 + [False] * 128
    runner.forget_graphs()
    assert all(each.is_reset for each in graphs)


def test_on_cpu_there_are_neither_graphs_nor_this_attention() -> None:
    model = tiny_model()
    assert not can_attend_varlen(model) and why_not_varlen(model) == "on cpu"
    assert batching_arguments(uses_graphs=False) == {"use_cuda_graph": False}


def test_memory_that_runs_out_while_a_graph_is_made_is_known() -> None:
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))


@pytest.mark.anyio
async def test_a_manager_that_is_given_up_gives_up_its_graphs_first(runner: Any) -> None:
    graph = Graph()
    runner.inputs_and_outputs.set_graph(graph)
    engine = TransformersEngine(str(MODEL_DIR), MASK_FILE, served_model_name="demo")
    processor = engine._manager.batch_processor
    assert processor is not None
    processor.model_runner = runner
    await engine.close()
    assert graph.is_reset
