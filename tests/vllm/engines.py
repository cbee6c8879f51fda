"""The demo model on vLLM. Imports vLLM when an engine is made."""

from typing import TYPE_CHECKING, Any

from modulation.demo import MASK_FILE, MODEL_DIR

if TYPE_CHECKING:
    from server.engines.vllm import VllmEngine


def new_engine(**settings: Any) -> "VllmEngine":
    """An engine for up to 32 requests at once, float32."""
    from server.engines.vllm import VllmEngine

    return VllmEngine(str(MODEL_DIR), MASK_FILE, served_model_name="demo", **{"max_num_seqs": 32, **settings})
