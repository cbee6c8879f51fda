"""Where the shipped demo model and its mask are. Knows two paths."""

from pathlib import Path
from typing import Final

MODEL_FOLDER: Final = Path(__file__).parent / "model"
MASK_FILE: Final = Path(__file__).parent / "mask.safetensors"
