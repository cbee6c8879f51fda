"""What helper threads of another thread cost: one forward pass of the demo model, milliseconds (median).

Two threads run it one after the other and both live on; `first` has helpers alone, `second` beside those of
the first.
"""

import statistics
import sys
import threading
import time

import torch
from transformers import AutoModelForCausalLM

from modulation.demo import MODEL_DIR

NUM_TOKENS = 8
NUM_PASSES = 200


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval()
    tokens = torch.arange(NUM_TOKENS)[None]
    may_end = threading.Event()

    def work(name: str, done: threading.Event) -> None:
        seconds = []
        with torch.inference_mode():
            for _ in range(NUM_PASSES):
                begun = time.perf_counter()
                model(input_ids=tokens, use_cache=False)
                seconds.append(time.perf_counter() - begun)
        sys.stdout.write(f"{name:7} {1000 * statistics.median(seconds):6.2f} ms\n")
        done.set()
        may_end.wait()

    for name in ("first", "second"):
        done = threading.Event()
        threading.Thread(target=work, args=(name, done)).start()
        done.wait()
    may_end.set()


if __name__ == "__main__":
    main()
