"""LoRA adapters beside modulation: each has its own tokens at each level, all in one batch."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm has it")

from modulation.demo import MODEL_DIR
from modulation.errors import ModelError
from modulation.levels import ZERO, Threshold
from server.engines.base import Chat, GenerateRequest
from server.engines.vllm import VllmEngine
from server.engines.vllm_adapters import read_adapters
from server.engines.vllm_arguments import VllmArguments
from tests.engines.contract import GREEDY, collect, tokens
from tests.vllm.asking import LENGTH, chats, six_levels
from tests.vllm.engines import new_engine
from tests.vllm.oracle import greedy

pytestmark = pytest.mark.anyio
RANK, SCALE = 4, 2.0
SITES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")


def random_adapter(folder: Path, seed: int) -> Path:
    """An adapter that changes attention and MLP of every layer, in PEFT's two files; and a model's folder
    with the same change made to its weights, named `merged`."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    source = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(SITES):
            out, width = module.weight.shape
            a = torch.randn(RANK, width, generator=source) / width**0.5
            b = torch.randn(out, RANK, generator=source) / RANK**0.5 * 0.4
            tensors |= {
                f"base_model.model.{name}.lora_A.weight": a,
                f"base_model.model.{name}.lora_B.weight": b,
            }
            module.weight.data += SCALE * (b @ a)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": SCALE * RANK, "bias": "none",
        "target_modules": sorted({site.split(".")[1] for site in SITES}),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model.save_pretrained(folder / "merged")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: random_adapter(folder / name, seed) for seed, name in enumerate(("first", "second"))}


@pytest.fixture(scope="module")
def engine(folders: dict[str, Path]) -> Iterator[VllmEngine]:
    engine = new_engine(
        arguments=VllmArguments(lora=[f"{name}={folder}" for name, folder in folders.items()])
    )
    yield engine
    asyncio.run(engine.close())


async def test_adapters_and_levels_in_one_batch_have_the_tokens_of_merged_weights_with_hooks(
    engine: VllmEngine, folders: dict[str, Path]
) -> None:
    asked, levels = chats(6), six_levels(engine)
    assert engine.describe().adapters == ("first", "second")

    async def answer(chat: Chat, threshold: Threshold, adapter: str | None) -> tuple[int, ...]:
        request = GenerateRequest(chat, threshold, GREEDY, LENGTH, adapter=adapter)
        return tokens(await collect(engine.generate(request)))

    keys = [
        (adapter, number, threshold)
        for number in range(len(asked))
        for threshold in levels
        for adapter in (None, "first", "second")
    ]
    for _ in range(2):  # the second time from the prefix cache
        answers = await asyncio.gather(*(answer(asked[number], at, adapter) for adapter, number, at in keys))
        found = dict(zip(keys, answers, strict=True))
        for adapter in (None, "first", "second"):
            weights = None if adapter is None else folders[adapter] / "merged"
            expected = greedy(asked, levels, LENGTH, weights)
            assert {(adapter, *key): each for key, each in expected.items()} == {
                key: each for key, each in found.items() if key[0] == adapter
            }
    same = [key for key in found if key[0] and found[key] == found[None, key[1], key[2]]]
    assert len(same) < len(found) / 3, "the adapters change next to nothing"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["first"], "'first': give NAME=FOLDER"),
        (["=x"], "a name has letters"),
        (["a@b=x"], "a name has letters"),
        (["demo={first}"], "the name demo is taken"),
        (["a={first}", "a={first}"], "the name a is taken"),
        (["a=nowhere"], "nowhere: it holds no adapter_model.safetensors"),
        (["a={broken}"], "broken: adapter_config.json cannot be read"),
        (["a={empty}"], "empty: adapter_model.safetensors cannot be read"),
        (["a={output}"], "output changes the output layer"),
        (["a={other}"], "no.such.layer.lora_A.weight is no matrix for a linear layer of this model"),
        (["a={narrow}"], r"q_proj.lora_A.weight has shape \(1, 1\), and the layer is 192 wide"),
        (["a={large}"], "large has rank 1024; vLLM takes at most 512"),
    ],
)
def test_what_is_no_adapter_is_refused_by_name(
    folders: dict[str, Path], tmp_path: Path, given: Sequence[str], says: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    right = "model.layers.0.self_attn.q_proj"
    broken = {
        "broken": ("{", right, model.config.hidden_size),
        "large": ('{"r": 8, "rank_pattern": {"q_proj": 1024}}', right, model.config.hidden_size),
        "output": ("{}", "lm_head", model.config.hidden_size),
        "other": ("{}", "model.no.such.layer", 1),
        "narrow": ("{}", right, 1),
    }
    for name, (config, layer, width) in broken.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(config)
        tensors = {f"base_model.model.{layer}.lora_A.weight": torch.ones(1, width)}
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "adapter_model.safetensors").touch()
    places = {**folders, **{name: tmp_path / name for name in (*broken, "empty")}}
    with pytest.raises(ModelError, match=says):
        read_adapters([each.format(**places) for each in given], "demo", model)


async def test_log_probabilities_of_prompts_in_one_batch_are_of_the_adapted_models(
    engine: VllmEngine, folders: dict[str, Path]
) -> None:
    """Where vLLM 0.32 reads logits by itself, these end it on CPUs."""
    texts = ("How do I bake bread?", "Bread", "Tell me how to bake bread in an oven.")
    asked = [(adapter, await engine.encode(text)) for adapter in (None, "second") for text in texts]

    async def logprobs(adapter: str | None, prompt: list[int]) -> list[float]:
        request = GenerateRequest(
            prompt, ZERO, GREEDY, max_tokens=1, num_logprobs=0, num_prompt_logprobs=0, adapter=adapter
        )
        outputs = await collect(engine.generate(request))
        return [each.chosen.logprob for output in outputs for each in output.prompt_logprobs or ()]

    answers = await asyncio.gather(*(logprobs(*each) for each in asked))
    for (adapter, prompt), found in zip(asked, answers, strict=True):
        folder = MODEL_DIR if adapter is None else folders[adapter] / "merged"
        with torch.inference_mode():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            logits = model(torch.tensor([prompt])).logits[0]
        expected = logits[:-1].log_softmax(-1).gather(1, torch.tensor(prompt)[1:, None])[:, 0]
        assert found[1:] == pytest.approx(expected.tolist(), abs=1e-3)
