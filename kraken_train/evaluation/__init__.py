"""Suites of tasks through lm-evaluation-harness, and what evaluations leave in an export."""
