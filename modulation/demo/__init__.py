"""The demo model: a synthetic corpus, a training recipe, and the trained model with its mask."""

from pathlib import Path

DEMO = "demo"
"""The name that commands know the shipped model by."""

MODEL_DIR = Path(__file__).parent / "model"
MASK_FILE = Path(__file__).parent / "mask.safetensors"
