"""This server beside what would be used instead: the same model, prompts and load, in one run."""
