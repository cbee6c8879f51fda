"""Engines: what generates text. The contract is in `base`; each other module implements it once."""
