"""Judging answers: prompts as JSON lines, rules, rates with intervals, and their table."""
