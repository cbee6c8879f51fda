"""Levels for engines that know nothing of neurons: as LoRA adapters, or baked into a checkpoint."""
