"""This server beside what would be used instead: the same model and load, in one run."""
