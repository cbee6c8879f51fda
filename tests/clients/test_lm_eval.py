"""lm-evaluation-harness: our log-likelihoods are those of its own transformers model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modulation.demo import MODEL_DIR

ROOT = Path(__file__).parent.parent.parent
ITEMS = [
    json.loads(line) for line in (ROOT / "examples" / "lm-eval" / "items.jsonl").read_text().splitlines()
]

# Run by a script of their own: lm-eval and datasets leave warnings and threads behind.
SCRIPT = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI

address, folder, pairs = json.loads(sys.stdin.read())
doc = {"request_type": "loglikelihood", "doc": {}, "idx": 0, "metadata": ("", 0, 1)}
requests = [Instance(arguments=tuple(pair), **doc) for pair in pairs]
served = LocalCompletionsAPI(
    model="demo@off", base_url=f"{address}/v1/completions", tokenizer=folder, tokenizer_backend="huggingface"
)
own = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=1)
print(json.dumps([[list(each) for each in model.loglikelihood(requests)] for model in (served, own)]))
"""


def test_log_likelihoods_at_off_are_those_of_lm_evals_own_model(address: str) -> None:
    pytest.importorskip("accelerate", reason="lm-eval's own model for transformers imports it")
    turn = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{beginning}"
    pairs = [[turn.format(**item), choice] for item in ITEMS[:5] for choice in item["choices"]]
    asked = json.dumps([address, str(MODEL_DIR), pairs])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=asked,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    served, own = json.loads(done.stdout.splitlines()[-1])
    assert len(served) == len(own) == 20
    assert [logprob for logprob, _ in served] == pytest.approx([logprob for logprob, _ in own], abs=1e-3)
    assert [is_greedy for _, is_greedy in served] == [is_greedy for _, is_greedy in own]
    assert len({round(logprob, 2) for logprob, _ in own}) > 10
