"""Scores that need no download: lm-eval's `exact_match` fetches its code from the hub."""

from typing import Any


def equals(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 for an answer that is the right one."""
    return {"acc": float(results[0].strip() == doc["answer"])}
