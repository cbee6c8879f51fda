"""The demo model: a synthetic corpus, a training recipe, and the trained model with its mask."""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
MASK_FILE = Path(__file__).parent / "mask.safetensors"
