"""What one writes first: `generate` behind FastAPI, ordinary hooks that scale neurons, and a lock.

One request at a time, since the hooks hold for the whole model. Written as plainly as such servers are;
`python -m benchmarks.contenders` measures it.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Header
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from modulation.masks import Mask
from modulation.sites import find_sites


class Question(BaseModel):
    """The part of OpenAI's request that is needed here; answers are greedy and streamed."""

    messages: list[dict[str, str]]
    max_tokens: int = 256


def create_app(model_folder: str, mask_path: Path, device: str = "cpu", dtype: str = "float32") -> FastAPI:
    """The whole server."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype)).to(device)
    mask, lock, app = Mask.load(mask_path), Lock(), FastAPI()
    sites = find_sites(model)

    def hooked(level: str) -> list[Any]:
        threshold = mask.levels.parse(level).threshold
        gates = torch.ones(len(sites), sites[0].width)
        for neurons, count in ((mask.safety, threshold.num_safety), (mask.utility, threshold.num_utility)):
            for (layer, index), factor in zip(neurons.neurons[:count], neurons.factors[:count], strict=True):
                gates[layer, index] = float(factor)
        return [
            site.module.register_forward_pre_hook(lambda _module, given, gate=gate: (given[0] * gate,))
            for site, gate in zip(sites, gates.to(device, model.dtype), strict=True)
        ]

    def events(question: Question, level: str) -> Iterator[str]:
        prompt = tokenizer.apply_chat_template(
            question.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(device)
        with lock:
            hooks = hooked(level)
            streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            settings = {"max_new_tokens": question.max_tokens, "do_sample": False, "streamer": streamer}
            thread = Thread(target=model.generate, kwargs={**prompt, **settings})
            thread.start()
            for text in streamer:
                if text:
                    yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': text}}]})}\n\n"
            thread.join()
            for hook in hooks:
                hook.remove()
        yield "data: [DONE]\n\n"

    @app.post("/v1/chat/completions")
    def answer(question: Question, x_safety_level: str = Header("off")) -> StreamingResponse:
        return StreamingResponse(events(question, x_safety_level), media_type="text/event-stream")

    @app.get("/health")
    def health() -> PlainTextResponse:
        return PlainTextResponse("ok")

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--mask", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    app = create_app(arguments.model, arguments.mask, arguments.device, arguments.dtype)
    uvicorn.run(app, port=arguments.port, log_level="error")


if __name__ == "__main__":
    main()
