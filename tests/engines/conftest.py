"""What tests of engines have in common."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.tiny_models import random_mask, save_mask, tiny_chat_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte tokenizer, and a mask of strong factors: every level shows."""
    path = tiny_chat_folder(tmp_path_factory.mktemp("tiny"))
    save_mask(random_mask(AutoModelForCausalLM.from_pretrained(path)), path)
    return path
