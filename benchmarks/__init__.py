"""Benchmarks: both sides interleaved in one run, ratios, JSON on the last line."""
