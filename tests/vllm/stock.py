"""Greedy answers of vLLM as it comes: `stock.py MODEL LENGTH ANSWERS`. Prompts, as token ids, come on
stdin and answers go to a file, both as JSON: vLLM's processes write to stdout as they please."""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams, TokensPrompt


def main() -> None:
    model, length, path = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    llm = LLM(
        model, dtype="float32", max_num_seqs=32, max_num_batched_tokens=512, kv_cache_memory_bytes=2**28
    )
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in json.load(sys.stdin)]
    answers = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=length), use_tqdm=False)
    path.write_text(json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))


if __name__ == "__main__":
    main()
